package luks2

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
)

// NextToken as an id lets SetToken choose the lowest free one.
const NextToken = -1

// Tokens returns the tokens by id: what else is needed to open keyslots, as
// JSON objects with at least "type" and "keyslots". They are as unauthenticated
// as the rest of the header, and of any shape inside.
func (h *Header) Tokens() map[int]json.RawMessage {
	out := make(map[int]json.RawMessage, len(h.meta.tokens))
	for id, raw := range h.meta.tokens {
		out[id] = bytes.Clone(raw)
	}
	return out
}

// SetToken sets token id, or the lowest free one for [NextToken], and returns
// the id. The token is a JSON object with a "type" and the list "keyslots" of
// ids, as strings, of keyslots that exist.
func (h *Header) SetToken(id int, token json.RawMessage) (int, error) {
	if id == NextToken {
		for id = 0; id < MaxKeyslots && h.meta.tokens[id] != nil; {
			id++
		}
		if id == MaxKeyslots {
			return 0, fmt.Errorf("set token: all %d tokens are taken", MaxKeyslots)
		}
	}
	if id < 0 || id >= MaxKeyslots {
		return 0, fmt.Errorf("set token %d: ids are 0 to %d", id, MaxKeyslots-1)
	}
	if err := checkJSON(token); err != nil {
		return 0, fmt.Errorf("set token %d: %w", id, err)
	}
	if err := h.meta.checkToken(token); err != nil {
		return 0, fmt.Errorf("set token %d: %w", id, err)
	}
	old := h.meta.tokens[id]
	h.meta.tokens[id] = bytes.Clone(token)
	if _, err := h.meta.encode(); err != nil {
		h.meta.tokens[id] = old
		if old == nil {
			delete(h.meta.tokens, id)
		}
		return 0, fmt.Errorf("set token %d: %w", id, err)
	}
	h.edited()
	return id, nil
}

// RemoveToken removes a token and leaves its keyslots alone.
func (h *Header) RemoveToken(id int) error {
	if _, ok := h.meta.tokens[id]; !ok {
		return fmt.Errorf("remove token %d: there is none", id)
	}
	delete(h.meta.tokens, id)
	h.edited()
	return nil
}

// checkToken looks at the two fields that every token has (specification §3.5).
func (m *metadata) checkToken(raw json.RawMessage) error {
	c := &checker{}
	o := c.object("", raw)
	if s, ok := o.str("type"); ok && s == "" {
		c.fail("type is empty")
	}
	for _, id := range o.ids("keyslots") {
		if _, ok := m.keyslots[id]; !ok {
			c.fail("keyslots: keyslot %d does not exist", id)
		}
	}
	return c.err
}

// unassign removes a keyslot from all tokens, and tokens that had no other.
func (h *Header) unassign(slot int) error {
	changed := maps.Clone(h.meta.tokens)
	for id, raw := range h.meta.tokens {
		c := &checker{}
		ids := c.object("", raw).ids("keyslots")
		i := slices.Index(ids, slot)
		if i < 0 {
			continue
		}
		if ids = slices.Delete(ids, i, i+1); len(ids) == 0 {
			delete(changed, id)
			continue
		}
		token, err := withKeyslots(raw, ids)
		if err != nil {
			return fmt.Errorf("edit token %d: %w", id, err)
		}
		changed[id] = token
	}
	h.meta.tokens = changed
	return nil
}

// withKeyslots changes the list of keyslots and nothing else.
func withKeyslots(raw json.RawMessage, ids []int) (json.RawMessage, error) {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(raw, &fields); err != nil {
		return nil, err
	}
	var names []string
	for _, id := range ids {
		names = append(names, strconv.Itoa(id))
	}
	list, err := marshal(names)
	if err != nil {
		return nil, err
	}
	fields["keyslots"] = list
	return marshal(fields)
}
