package spec

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Marshal writes the spec as YAML that [Parse] reads back to an equal one. Keys
// are sorted, comments and positions are gone, and the bytes depend on the
// values alone.
func (s *Spec) Marshal() ([]byte, error) {
	return yaml.Marshal(node(plain(reflect.ValueOf(s).Elem())))
}

// node makes the YAML tree of what plain returns. Text of several lines is in
// double quotes: the library's block form of text that begins with white space
// is not valid YAML.
func node(v any) *yaml.Node {
	switch v := v.(type) {
	case map[string]any:
		n := &yaml.Node{Kind: yaml.MappingNode, Tag: "!!map"}
		for _, key := range slices.Sorted(maps.Keys(v)) {
			n.Content = append(n.Content, node(key), node(v[key]))
		}
		return n
	case []any:
		n := &yaml.Node{Kind: yaml.SequenceNode, Tag: "!!seq"}
		for _, item := range v {
			n.Content = append(n.Content, node(item))
		}
		return n
	case string:
		n := &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: v}
		if strings.ContainsAny(v, "\n\r\u0085\u2028\u2029") {
			n.Style = yaml.DoubleQuotedStyle
		}
		return n
	case bool:
		return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!bool", Value: strconv.FormatBool(v)}
	}
	return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!int", Value: fmt.Sprint(v)}
}

// MarshalJSON is [Spec.Marshal] as JSON.
func (s *Spec) MarshalJSON() ([]byte, error) { return json.Marshal(plain(reflect.ValueOf(s).Elem())) }

// plain turns a value into maps, lists and scalars, leaving out what is not given.
func plain(v reflect.Value) any {
	if v.Kind() == reflect.Pointer {
		return plain(v.Elem())
	}
	own := reflect.New(v.Type())
	own.Elem().Set(v)
	if s, ok := own.Interface().(scalar); ok {
		return s.plain()
	}
	switch v.Kind() {
	case reflect.Struct:
		m := map[string]any{}
		for _, f := range fieldsOf(v.Type()) {
			if value := v.FieldByIndex(f.index); !value.IsZero() {
				m[f.key] = plain(value)
			}
		}
		return m
	case reflect.Map:
		m := map[string]any{}
		for it := v.MapRange(); it.Next(); {
			m[it.Key().String()] = plain(it.Value())
		}
		return m
	case reflect.Slice:
		list := make([]any, v.Len())
		for i := range list {
			list[i] = plain(v.Index(i))
		}
		return list
	}
	return v.Interface()
}
