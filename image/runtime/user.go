package runtime

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/holdfast-os/holdfast/image/spec"
)

const maxUserFileBytes = 1 << 20

// account is a line of passwd or group: name, number, the primary group and the members.
type account struct {
	name    string
	id, gid uint32
	members []string
}

// userOf finds the user: the spec's uid and gid, else its user, else the
// image's. A user that is in the image's passwd has the groups of its passwd
// and group files; one that is not has group 0, as with Docker.
func userOf(c *spec.Image, img *ImageConfig) (specs.User, error) {
	uid, gid := c.UID, c.GID
	if uid == nil && gid == nil {
		text := c.User
		if text == "" {
			text = img.User
		}
		var err error
		if uid, gid, err = splitUser(text); err != nil {
			return specs.User{}, err
		}
	}
	if uid == nil {
		uid = &spec.ID{}
	}
	user, err := lookup(img, *uid, gid)
	if err != nil {
		return user, err
	}
	for _, id := range c.AdditionalGIDs {
		g, err := groupID(img, id)
		if err != nil {
			return user, err
		}
		user.AdditionalGids = append(user.AdditionalGids, g)
	}
	slices.Sort(user.AdditionalGids)
	user.AdditionalGids = slices.Compact(user.AdditionalGids)
	if user.UID > maxID || user.GID > maxID {
		return user, fmt.Errorf("user %d:%d: the kernel has no such id", user.UID, user.GID)
	}
	return user, nil
}

func splitUser(text string) (uid, gid *spec.ID, err error) {
	if text == "" {
		return nil, nil, nil
	}
	name, group, hasGroup := strings.Cut(text, ":")
	id, err := spec.ParseID(name)
	if err != nil {
		return nil, nil, fmt.Errorf("user %q: %w", text, err)
	}
	if hasGroup && group != "" {
		g, err := spec.ParseID(group)
		if err != nil {
			return nil, nil, fmt.Errorf("user %q: %w", text, err)
		}
		gid = &g
	}
	return &id, gid, nil
}

func lookup(img *ImageConfig, id spec.ID, gid *spec.ID) (specs.User, error) {
	user := specs.User{UID: id.Number}
	// Root in no group but its own needs no file; a name or a number may have an entry.
	if id.Name != "" || id.Number != 0 {
		users, err := accounts("passwd", img.Passwd)
		if err != nil {
			return user, err
		}
		i := slices.IndexFunc(users, func(a account) bool {
			return id.Name != "" && a.name == id.Name || id.Name == "" && a.id == id.Number
		})
		if i < 0 && id.Name != "" {
			return user, fmt.Errorf("user %q is not in the image's /etc/passwd: give its number", id.Name)
		}
		if i >= 0 {
			user.UID, user.GID = users[i].id, users[i].gid
		}
		if i >= 0 && gid == nil {
			if user.AdditionalGids, err = memberships(img, users[i].name); err != nil {
				return user, err
			}
		}
	}
	if gid != nil {
		g, err := groupID(img, *gid)
		if err != nil {
			return user, err
		}
		user.GID = g
	}
	return user, nil
}

func groupID(img *ImageConfig, id spec.ID) (uint32, error) {
	if id.Name == "" {
		return id.Number, nil
	}
	groups, err := accounts("group", img.Group)
	if err != nil {
		return 0, err
	}
	i := slices.IndexFunc(groups, func(a account) bool { return a.name == id.Name })
	if i < 0 {
		return 0, fmt.Errorf("group %q is not in the image's /etc/group: give its number", id.Name)
	}
	return groups[i].id, nil
}

// memberships lists the groups that name the user as a member.
func memberships(img *ImageConfig, user string) ([]uint32, error) {
	groups, err := accounts("group", img.Group)
	if err != nil {
		return nil, err
	}
	var gids []uint32
	for _, g := range groups {
		if slices.Contains(g.members, user) {
			gids = append(gids, g.id)
		}
	}
	return gids, nil
}

// accounts reads a file in the form of passwd(5) or group(5). Lines that are not
// in that form are passed over, as the C library does.
func accounts(name string, read func() ([]byte, error)) ([]account, error) {
	if read == nil {
		return nil, nil
	}
	data, err := read()
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read /etc/%s of the image: %w", name, err)
	}
	if len(data) > maxUserFileBytes {
		return nil, fmt.Errorf("read /etc/%s of the image: %d bytes are more than %d", name, len(data), maxUserFileBytes)
	}
	var list []account
	for line := range strings.Lines(string(data)) {
		f := strings.Split(strings.TrimRight(line, "\r\n"), ":")
		if len(f) < 4 || f[0] == "" {
			continue
		}
		id, err := strconv.ParseUint(f[2], 10, 32)
		if err != nil {
			continue
		}
		a := account{name: f[0], id: uint32(id)}
		if name == "group" {
			a.members = strings.Split(f[3], ",")
		} else {
			gid, err := strconv.ParseUint(f[3], 10, 32)
			if err != nil {
				continue
			}
			a.gid = uint32(gid)
		}
		list = append(list, a)
	}
	return list, nil
}
