package spec

import (
	"fmt"
	"reflect"
	"strconv"
	"strings"
)

func index(path string, i int) string { return fmt.Sprintf("%s[%d]", path, i) }

// Merge puts several files together, in order: single values of a later file
// replace those of an earlier one (kernel, disk and seal key by key), lists
// append, sysctl is joined by name. handoff is one value, not a list. Volumes
// of every file can be used by every other. Positions stay those of the file
// that said it. The error is [*Errors]: what one file alone may say and the
// whole may not, such as the same service twice.
func Merge(specs ...*Spec) (*Spec, error) {
	out := &Spec{pos: positions{}}
	for _, s := range specs {
		m := merger{pos: s.pos, offset: map[string]int{}}
		m.merge("", reflect.ValueOf(out).Elem(), reflect.ValueOf(s).Elem())
		out.Warnings = append(out.Warnings, s.Warnings...)
		for path, at := range s.pos {
			if _, first := out.pos[path]; path == "" && first {
				continue
			}
			out.pos[m.moved(path)] = at
		}
	}
	r := report{pos: out.pos}
	r.checkSpec(out)
	return out, r.err()
}

type merger struct {
	pos    positions
	offset map[string]int // list → how many items were there before
}

func (m *merger) merge(path string, to, from reflect.Value) {
	if path != "" && from.IsZero() && !m.pos.has(path) {
		return
	}
	_, isScalar := to.Addr().Interface().(scalar)
	switch {
	case isScalar:
		to.Set(from)
	case to.Kind() == reflect.Struct:
		for _, f := range fieldsOf(to.Type()) {
			m.merge(join(path, f.key), to.FieldByIndex(f.index), from.FieldByIndex(f.index))
		}
	case to.Kind() == reflect.Slice && !from.IsNil():
		m.offset[path] = to.Len()
		// A new list: the first file's must not change under its owner.
		joined := reflect.MakeSlice(to.Type(), 0, to.Len()+from.Len())
		to.Set(reflect.AppendSlice(reflect.AppendSlice(joined, to), from))
	case to.Kind() == reflect.Map && !from.IsNil():
		joined := reflect.MakeMap(to.Type())
		for _, v := range []reflect.Value{to, from} {
			for it := v.MapRange(); it.Next(); {
				joined.SetMapIndex(it.Key(), it.Value())
			}
		}
		to.Set(joined)
	case to.Kind() != reflect.Slice && to.Kind() != reflect.Map:
		to.Set(from)
	}
}

// moved is the path in the whole of what stands at path in one file.
func (m *merger) moved(path string) string {
	open := strings.IndexByte(path, '[')
	if open < 0 {
		return path
	}
	offset := m.offset[path[:open]]
	digits, rest, ok := strings.Cut(path[open+1:], "]")
	i, err := strconv.Atoi(digits)
	if offset == 0 || !ok || err != nil {
		return path
	}
	return index(path[:open], i+offset) + rest
}
