package spec

import (
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"go.yaml.in/yaml/v3"
)

// decoder turns YAML nodes into Go values, noting positions and collecting every problem.
type decoder struct {
	report
	file    string
	values  int
	stopped bool // a limit was hit and reported
}

// field is a key of a mapping and the struct field it fills.
type field struct {
	key    string
	index  []int
	number bool // a text that may be written as a number
}

// fieldsOf lists the keys of a struct. The OCI types come with JSON names,
// which are the ones LinuxKit's schema has.
func fieldsOf(t reflect.Type) []field {
	var list []field
	for i := range t.NumField() {
		sf := t.Field(i)
		if sf.Anonymous {
			for _, inner := range fieldsOf(sf.Type) {
				inner.index = append([]int{i}, inner.index...)
				list = append(list, inner)
			}
			continue
		}
		tag := sf.Tag.Get("yaml")
		if tag == "" {
			tag = sf.Tag.Get("json")
		}
		key, options, _ := strings.Cut(tag, ",")
		if !sf.IsExported() || key == "-" || key == "" {
			continue
		}
		list = append(list, field{key, []int{i}, options == "number"})
	}
	return list
}

// value decodes n into v, which is settable. Problems are noted, not returned.
func (d *decoder) value(n *yaml.Node, path string, v reflect.Value, depth int) {
	for ; n.Kind == yaml.AliasNode && n.Alias != nil; n = n.Alias {
		depth++
	}
	if !d.within(n, path, depth) {
		return
	}
	if path != "" {
		d.pos[path] = Position{d.file, n.Line, n.Column}
	}
	if v.Kind() == reflect.Pointer {
		inner := reflect.New(v.Type().Elem())
		d.value(n, path, inner.Elem(), depth+1)
		v.Set(inner)
		return
	}
	if s, ok := v.Addr().Interface().(scalar); ok {
		if err := s.set(n); err != nil {
			d.wrong(path, err)
		}
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		d.mapping(n, path, v, depth)
	case reflect.Map:
		d.textMap(n, path, v, depth, false)
	case reflect.Slice:
		d.list(n, path, v, depth)
	default:
		d.basic(n, path, v)
	}
}

// within holds the limits that stop alias bombs; it reports the first breach.
func (d *decoder) within(n *yaml.Node, path string, depth int) bool {
	if d.stopped {
		return false
	}
	d.values++
	at := Position{d.file, n.Line, n.Column}
	switch {
	case depth > maxDepth:
		d.errorAt(at, path, "", fmt.Sprintf("nested deeper than %d levels", maxDepth))
	case d.values > maxValues:
		d.errorAt(at, path, "aliases count each time they are used", fmt.Sprintf("more than %d values", maxValues))
	default:
		return true
	}
	d.stopped = true
	return false
}

func (d *decoder) mapping(n *yaml.Node, path string, v reflect.Value, depth int) {
	if n.Kind != yaml.MappingNode {
		d.wrong(path, wrongType(describe(v.Type()), n))
		return
	}
	fields := fieldsOf(v.Type())
	keys := make([]string, len(fields))
	for i, f := range fields {
		keys[i] = f.key
	}
	d.pairs(n, path, depth, func(key *yaml.Node, value *yaml.Node) {
		name := canonicalKey(v.Type(), key.Value)
		i := slices.Index(keys, name)
		if i < 0 {
			remedy := foreignKey(v.Type(), key.Value)
			if remedy == "" {
				remedy = didYouMean(key.Value, keys)
			}
			d.errorAt(Position{d.file, key.Line, key.Column}, path, remedy, fmt.Sprintf("unknown key %q", key.Value))
			return
		}
		at := join(path, name)
		if value.Kind == yaml.ScalarNode && value.ShortTag() == "!!null" {
			d.pos[at] = Position{d.file, key.Line, key.Column}
			d.warnf(at, "remove the key, or give it a value", "has no value and counts as not given")
			return
		}
		target := v.FieldByIndex(fields[i].index)
		switch {
		case !fields[i].number:
			d.value(d.normalise(v.Type(), name, value), at, target, depth+1)
		case d.within(value, at, depth+1):
			d.textMap(value, at, target, depth+1, true)
		}
	})
}

// pairs calls each for the pairs of a mapping once: duplicates are errors, merge
// keys ("<<") give what the mapping itself has not.
func (d *decoder) pairs(n *yaml.Node, path string, depth int, each func(key, value *yaml.Node)) {
	d.values += len(n.Content) / 2 // unknown and overridden keys cost as well
	first := map[string]int{}
	var merged []*yaml.Node
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		for key.Kind == yaml.AliasNode && key.Alias != nil {
			key = key.Alias
		}
		at := Position{d.file, key.Line, key.Column}
		if key.Kind == yaml.ScalarNode && key.ShortTag() == "!!merge" {
			merged = append(merged, value)
			continue
		}
		if key.Kind != yaml.ScalarNode || key.ShortTag() != "!!str" {
			d.errorAt(at, path, fmt.Sprintf("quote it: %q", key.Value), "a key is "+written(key)+", not text")
			continue
		}
		if line, seen := first[key.Value]; seen {
			d.errorAt(at, path, "", fmt.Sprintf("key %q is given twice, first in line %d", key.Value, line))
			continue
		}
		first[key.Value] = key.Line
		each(key, value)
	}
	for _, m := range merged {
		d.merge(m, path, depth, first, each)
	}
}

func (d *decoder) merge(m *yaml.Node, path string, depth int, seen map[string]int, each func(key, value *yaml.Node)) {
	for ; m.Kind == yaml.AliasNode && m.Alias != nil; m = m.Alias {
		depth++
	}
	if !d.within(m, path, depth) {
		return
	}
	switch m.Kind {
	case yaml.SequenceNode: // the first mapping that has a key wins
		for _, item := range m.Content {
			d.merge(item, path, depth+1, seen, each)
		}
	case yaml.MappingNode:
		d.pairs(m, path, depth+1, func(key, value *yaml.Node) {
			if _, ok := seen[key.Value]; !ok {
				seen[key.Value] = key.Line
				each(key, value)
			}
		})
	default:
		d.errorAt(Position{d.file, m.Line, m.Column}, path, "", "a merge key (<<) takes a mapping, got "+written(m))
	}
}

func (d *decoder) textMap(n *yaml.Node, path string, v reflect.Value, depth int, number bool) {
	for ; n.Kind == yaml.AliasNode && n.Alias != nil; n = n.Alias {
	}
	d.pos[path] = Position{d.file, n.Line, n.Column}
	if n.Kind != yaml.MappingNode {
		d.wrong(path, wrongType(describe(v.Type()), n))
		return
	}
	v.Set(reflect.MakeMap(v.Type()))
	d.pairs(n, path, depth, func(key, value *yaml.Node) {
		at := join(path, key.Value)
		item := reflect.New(v.Type().Elem()).Elem()
		for value.Kind == yaml.AliasNode && value.Alias != nil {
			value = value.Alias
		}
		if number && value.Kind == yaml.ScalarNode && value.ShortTag() == "!!int" {
			value = &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: value.Value, Line: value.Line, Column: value.Column}
		}
		d.value(value, at, item, depth+1)
		v.SetMapIndex(reflect.ValueOf(key.Value), item)
	})
}

func (d *decoder) list(n *yaml.Node, path string, v reflect.Value, depth int) {
	if n.Kind != yaml.SequenceNode {
		err := wrongType(describe(v.Type()), n)
		if n.Kind == yaml.ScalarNode && n.ShortTag() == "!!str" && v.Type().Elem().Kind() == reflect.String {
			err.(*hinted).hint = fmt.Sprintf("write [%q]", n.Value)
		}
		d.wrong(path, err)
		return
	}
	list := reflect.MakeSlice(v.Type(), 0, min(len(n.Content), 1024))
	for i, item := range n.Content {
		if d.stopped {
			break
		}
		e := reflect.New(v.Type().Elem()).Elem()
		d.value(d.normalise(v.Type(), "", item), fmt.Sprintf("%s[%d]", path, i), e, depth+1)
		list = reflect.Append(list, e)
	}
	v.Set(list)
}

// basic decodes text, booleans and whole numbers.
func (d *decoder) basic(n *yaml.Node, path string, v reflect.Value) {
	expected := describe(v.Type())
	if n.Kind != yaml.ScalarNode {
		d.wrong(path, wrongType(expected, n))
		return
	}
	tag := n.ShortTag()
	switch k := v.Kind(); {
	case k == reflect.String && tag == "!!str":
		v.SetString(n.Value)
	case k == reflect.Bool && tag == "!!bool":
		v.SetBool(strings.EqualFold(n.Value, "true"))
	case v.CanInt() && tag == "!!int":
		var i int64
		if err := n.Decode(&i); err != nil || v.OverflowInt(i) {
			d.errorf(path, "", "%s does not fit in %d bits", n.Value, v.Type().Bits())
			return
		}
		v.SetInt(i)
	case v.CanUint() && tag == "!!int":
		var u uint64
		if err := n.Decode(&u); err != nil || v.OverflowUint(u) {
			d.errorf(path, "", "%s is negative or does not fit in %d bits", n.Value, v.Type().Bits())
			return
		}
		v.SetUint(u)
	default:
		d.wrong(path, wrongType(expected, n))
	}
}

// wrongType says what was expected and what was found.
func wrongType(expected string, n *yaml.Node) error {
	remedy := ""
	if n.Kind == yaml.ScalarNode {
		switch tag := n.ShortTag(); {
		case expected == "text" && tag != "!!null" && tag != "!!binary":
			remedy = fmt.Sprintf("quote it: %q", n.Value)
		case expected == "true or false" && slices.Contains([]string{"yes", "on", "y"}, strings.ToLower(n.Value)):
			remedy = "write true"
		case expected == "true or false" && slices.Contains([]string{"no", "off", "n"}, strings.ToLower(n.Value)):
			remedy = "write false"
		case expected == "true or false" && (n.Value == "true" || n.Value == "false"):
			remedy = "remove the quotes"
		case expected == "a whole number" && tag == "!!str" && isNumber(n.Value):
			remedy = "remove the quotes"
		}
	}
	return &hinted{fmt.Sprintf("expected %s, got %s", expected, written(n)), remedy}
}

func isNumber(text string) bool { _, err := strconv.ParseInt(text, 10, 64); return err == nil }

// describe names a type as its author would.
func describe(t reflect.Type) string {
	if s, ok := reflect.New(t).Interface().(scalar); ok {
		return s.expected()
	}
	switch t.Kind() {
	case reflect.String:
		return "text"
	case reflect.Bool:
		return "true or false"
	case reflect.Struct:
		return "a mapping (key: value)"
	case reflect.Map:
		return "a mapping (name: value)"
	case reflect.Slice:
		if t.Elem().Kind() == reflect.String {
			return "a list of strings"
		}
		if t.Elem().Kind() == reflect.Struct && strings.HasPrefix(describe(t.Elem()), "a mapping") {
			return "a list of mappings"
		}
		return "a list, each item " + describe(t.Elem())
	}
	return "a whole number"
}

// written names what stands in the file.
func written(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	switch tag := n.ShortTag(); tag {
	case "!!str":
		const longest = 40
		if len(n.Value) > longest {
			return "text"
		}
		return fmt.Sprintf("the text %q", n.Value)
	case "!!int", "!!float":
		return "a number"
	case "!!bool":
		return n.Value
	case "!!null":
		return "nothing"
	case "!!timestamp":
		return "a date"
	default:
		return "a value with the tag " + tag
	}
}

func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

// canonicalKey maps LinuxKit's spelling of a key to OCI's where they differ.
func canonicalKey(t reflect.Type, key string) string {
	if t == reflect.TypeFor[specs.LinuxResources]() && key == "blockio" {
		return "blockIO"
	}
	return key
}

// normalise rewrites values that LinuxKit's schema and OCI's types disagree on
// (a huge page size is a number there and "2MB" here) and lets memory limits be
// written with a unit.
func (d *decoder) normalise(t reflect.Type, key string, n *yaml.Node) *yaml.Node {
	if n.Kind != yaml.ScalarNode {
		return n
	}
	scalarLike := *n
	switch {
	case t == reflect.TypeFor[specs.LinuxHugepageLimit]() && key == "pageSize" && n.ShortTag() == "!!int":
		bytes, err := strconv.ParseInt(n.Value, 10, 64)
		if err != nil || bytes < 1<<10 || bytes&(bytes-1) != 0 {
			return n // the type error says what is expected
		}
		scalarLike.Tag, scalarLike.Value = "!!str", pageSize(bytes)
	case t == reflect.TypeFor[specs.LinuxMemory]() && n.ShortTag() == "!!str" && key != "swappiness":
		size, err := ParseSize(n.Value)
		if err != nil {
			return n
		}
		scalarLike.Tag, scalarLike.Value, scalarLike.Style = "!!int", strconv.FormatInt(int64(size), 10), 0
	default:
		return n
	}
	return &scalarLike
}

// pageSize is the form the kernel has in its hugetlb file names: 64KB, 2MB, 1GB.
func pageSize(bytes int64) string {
	for _, u := range []struct {
		name  string
		bytes int64
	}{{"GB", 1 << 30}, {"MB", 1 << 20}, {"KB", 1 << 10}} {
		if bytes%u.bytes == 0 {
			return strconv.FormatInt(bytes/u.bytes, 10) + u.name
		}
	}
	return strconv.FormatInt(bytes, 10) + "B"
}

// foreignKey says what to use for keys that people bring from Docker Compose,
// Kubernetes, and LinuxKit's documentation where it is wrong.
func foreignKey(t reflect.Type, key string) string {
	image := map[string]string{
		"args":         `use command`,
		"cap_add":      "use capabilities",
		"container":    "use name",
		"depends_on":   "services start side by side; use onboot for what must come first",
		"entrypoint":   "use command",
		"environment":  "use env: a list of NAME=value",
		"healthcheck":  "use health",
		"labels":       "use annotations",
		"network_mode": "use net",
		"noRestart":    "use restart: never",
		"ports":        "with net: host, the default, ports need no mapping",
		"privileged":   "use capabilities: [all] and devices",
		"rmlimits":     "use rlimits",
		"seccomp":      "seccomp is not in this version; use capabilities",
		"volumes":      "use binds: [/data:/data]",
		"workdir":      "use cwd",
		"working_dir":  "use cwd",
	}
	top := map[string]string{
		"cmdline":  "use kernel: {cmdline: ...}",
		"data":     "use disk: {data: [...]}",
		"image":    "images belong under kernel, init, onboot or services",
		"modules":  "use kernel: {modules: [...]}",
		"networks": "use network",
		"slots":    "the two slots are always there; disk.slot is their size",
	}
	switch t {
	case reflect.TypeFor[Image]():
		return image[key]
	case reflect.TypeFor[Spec]():
		return top[key]
	}
	return ""
}

// wholeMiB says whether a partition can have this size.
func (s Size) wholeMiB() bool { return s%(1<<20) == 0 }
