package main

import (
	"context"
	"debug/elf"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"filippo.io/age"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/holdfast-os/holdfast/image/build"
	"github.com/holdfast-os/holdfast/update/repo"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"holdfast": main,
	})
}

// TestScripts runs the program as a person does. Beside testscript's own, the
// scripts have these commands:
//
//	code N PROGRAM ARGUMENTS   run it; it must exit with N
//	atmost N                   the last standard output has at most N lines
//	holds FOLDER NAME...       the folder holds exactly these
//	perm MODE FILE...          permission bits
//	json TYPE                  the last standard output is one JSON object of that type
//	flip FILE OFFSET           turn one byte over; from the end when negative
//	cut FILE SIZE              shorten a file
//	mkrelease KEYS FOLDER [VERSION [PRODUCT [EPOCH [MIB]]]]
//	                           a small release, signed with these keys
//	mkdisk FILE [RELEASE [TRIES]]
//	                           a disk, with the release in slot A, on trial with 3 tries; with 0 it is good
//	age KEY                    an age key; its recipient is in KEY.pub
//	mkrepo KEYS DIR DAYS RELEASE
//	                           a repository of that many days ago, with the release in channel stable
//	mkregistry                 a container registry, at $REGISTRY
//	mkimage NAME               an image in it
//	device ROOT URL VERSION    a device with that root.json finds this version there, and fetches it
//	mkluks FILE                a volume by our own package
//	mkescrow VOLUME ESCROW SERIAL THRESHOLD RECIPIENT...
//	                           a volume and its recovery key, encrypted to the keys in these files
//	mkescrowof BOX RECORDS VOLUME ESCROW SERIAL THRESHOLD RECIPIENT...
//	                           one that the box's TPM signs, and what is recorded of that
//	mkbox NAME KEYS RELEASE    a box that runs the release, and NAME.root.pem, who made its TPM
//	answer NAME CHALLENGE FOLDER
//	                           the box answers a challenge
//	erase NAME PROOF [CHALLENGE]
//	                           it destroys the keys of its data; CHALLENGE none: its TPM is dead
//	kernel FILE                Debian's kernel package
//	program FILE BYTES         a static program, with that much noise; it does nothing
func TestScripts(t *testing.T) {
	scripts, err := filepath.Glob("testdata/script/*.txtar")
	if err != nil || len(scripts) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	b := &boxes{t, map[string]*testBox{}}
	testscript.Run(t, testscript.Params{
		Files:               scripts,
		RequireExplicitExec: true,
		Setup: func(e *testscript.Env) error {
			e.Setenv("HOME", filepath.Join(e.WorkDir, "home"))
			e.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
			e.Setenv("HOLDFAST_INPUTS", os.Getenv("HOLDFAST_INPUTS"))
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"code": wantCode, "atmost": wantLines, "holds": wantEntries, "perm": wantMode, "json": wantJSON,
			"flip": flip, "cut": cut, "mkrelease": scriptRelease, "mkdisk": scriptDisk, "mkluks": scriptLUKS, "mkescrow": scriptEscrow,
			"mkbox": b.boot, "answer": b.answer, "erase": b.erase, "mkescrowof": b.escrow, "kernel": linkKernel, "program": scriptProgram, "age": scriptAge, "mkrepo": scriptRepo,
			"mkregistry": scriptRegistry, "mkimage": scriptImage, "device": scriptDevice,
		},
	})
}

// arguments checks how a script calls a command; none of them can be negated.
func arguments(ts *testscript.TestScript, neg bool, args []string, least int) {
	if neg || len(args) < least {
		ts.Fatalf("this command takes %d arguments and no !", least)
	}
}

func number(ts *testscript.TestScript, text string) int64 {
	n, err := strconv.ParseInt(text, 0, 64)
	ts.Check(err)
	return n
}

func wantCode(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, 2)
	got := 0
	err := ts.Exec(args[1], args[2:]...)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if int64(got) != number(ts, args[0]) {
		ts.Fatalf("exit code %d, want %s", got, args[0])
	}
}

func wantLines(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, 1)
	if n := strings.Count(ts.ReadFile("stdout"), "\n"); int64(n) > number(ts, args[0]) {
		ts.Fatalf("%d lines on standard output, want at most %s", n, args[0])
	}
}

func wantEntries(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, 1)
	entries, err := os.ReadDir(ts.MkAbs(args[0]))
	ts.Check(err)
	got := []string{}
	for _, e := range entries {
		got = append(got, e.Name())
	}
	want := append([]string{}, args[1:]...)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		ts.Fatalf("%s holds %q, want %q", args[0], got, want)
	}
}

func wantMode(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, 2)
	for _, name := range args[1:] {
		info, err := os.Stat(ts.MkAbs(name))
		ts.Check(err)
		if got := info.Mode().Perm(); got != fs.FileMode(number(ts, args[0])) {
			ts.Fatalf("%s has mode %#o, want %s", name, got, args[0])
		}
	}
}

func wantJSON(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, 1)
	var head struct{ Type string }
	if err := json.Unmarshal([]byte(ts.ReadFile("stdout")), &head); err != nil {
		ts.Fatalf("standard output is not one JSON object: %v", err)
	}
	if head.Type != args[0] {
		ts.Fatalf("type %q, want %q", head.Type, args[0])
	}
}

func flip(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, 2)
	f, err := os.OpenFile(ts.MkAbs(args[0]), os.O_RDWR, 0)
	ts.Check(err)
	defer f.Close()
	off := number(ts, args[1])
	if off < 0 {
		info, err := f.Stat()
		ts.Check(err)
		off += info.Size()
	}
	b := make([]byte, 1)
	_, err = f.ReadAt(b, off)
	ts.Check(err)
	b[0] ^= 0xff
	_, err = f.WriteAt(b, off)
	ts.Check(err)
}

func cut(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, 2)
	ts.Check(os.Truncate(ts.MkAbs(args[0]), number(ts, args[1])))
}

// linkKernel puts Debian's kernel package into the script's folder.
func linkKernel(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, 1)
	deb := filepath.Join(ts.Getenv("HOLDFAST_INPUTS"), "linux-image.deb")
	if _, err := os.Stat(deb); err != nil || !filepath.IsAbs(deb) {
		ts.Fatalf("no kernel package in HOLDFAST_INPUTS=%q: run make inputs, and the tests by make test", ts.Getenv("HOLDFAST_INPUTS"))
	}
	ts.Check(os.Symlink(deb, ts.MkAbs(args[0])))
}

func scriptProgram(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, 2)
	h := elf.Header64{Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: 1, Entry: 0x400078, Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1, Shentsize: 64}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	b, err := binary.Append(nil, binary.LittleEndian, h)
	ts.Check(err)
	b, err = binary.Append(b, binary.LittleEndian, elf.Prog64{Type: uint32(elf.PT_LOAD), Vaddr: 0x400000, Filesz: 120, Memsz: 120})
	ts.Check(err)
	noise := make([]byte, number(ts, args[1]))
	rand.NewChaCha8([32]byte{}).Read(noise)
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), append(b, noise...), 0o755))
}

func scriptRelease(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, 2)
	r := testRelease{product: "ledger", version: "1.2.3"}
	if len(args) > 2 {
		r.version = args[2]
	}
	if len(args) > 3 {
		r.product = args[3]
	}
	if len(args) > 4 {
		r.epoch = number(ts, args[4])
	}
	if len(args) > 5 {
		r.noiseMiB = number(ts, args[5])
	}
	ts.Check(makeRelease(ts.MkAbs(args[0]), ts.MkAbs(args[1]), r))
}

func scriptDisk(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, 1)
	dir, tries := "", 3
	if len(args) > 1 {
		dir = ts.MkAbs(args[1])
	}
	if len(args) > 2 {
		tries = int(number(ts, args[2]))
	}
	ts.Check(makeDisk(ts.MkAbs(args[0]), dir, tries))
}

func scriptAge(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, 1)
	k, err := age.GenerateX25519Identity()
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(k.String()+"\n"), 0o600))
	ts.Check(os.WriteFile(ts.MkAbs(args[0])+".pub", []byte(k.Recipient().String()), 0o600))
	ts.Setenv("RECIPIENT", k.Recipient().String())
}

// scriptRepo makes a repository that time has passed for.
func scriptRepo(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, 4)
	then := time.Now().AddDate(0, 0, -int(number(ts, args[2])))
	r, err := repo.Create(ts.MkAbs(args[1]), ts.MkAbs(args[0]), then, repo.Options{})
	ts.Check(err)
	_, err = r.Add(context.Background(), ts.MkAbs(args[3]), repo.AddOptions{Channel: "stable"}, packer{func(build.Step) {}})
	ts.Check(err)
}

func scriptLUKS(ts *testscript.TestScript, neg bool, args []string) {
	arguments(ts, neg, args, 1)
	f, err := os.Create(ts.MkAbs(args[0]))
	ts.Check(err)
	defer f.Close()
	ts.Check(f.Truncate(volumeBytes))
	v, err := newVolume()
	ts.Check(err)
	_, err = v.AddKeyslot(v.key, []byte("management"), cheapKDF(), nil)
	ts.Check(err)
	ts.Check(v.writeTo(f))
}
