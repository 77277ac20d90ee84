package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/klauspost/compress/zstd"
)

// squashfsFile is how a file lies in a squashfs 4.0: the size of each of its blocks as
// they are stored. What is in a fragment is not among them.
type squashfsFile struct {
	blockBytes int64 // unpacked
	blocks     []int64
}

const (
	squashfsMagic    = 0x73717368
	squashfsZstd     = 6
	squashfsPlain    = 1 << 24 // in the size of a block: not compressed
	squashfsMetaMax  = 8192
	squashfsMaxTable = 16 << 20
)

// squashfsSuper is the start of struct squashfs_super_block.
type squashfsSuper struct {
	Magic, Inodes, MTime, BlockBytes, Fragments               uint32
	Compression, BlockLog, Flags, IDs, Major, Minor           uint16
	Root, Bytes, IDTable, XattrTable, InodeTable, FolderTable uint64
}

// squashfsFiles reads the inodes of a small squashfs with zstd and gives its files by
// their sizes.
func squashfsFiles(path string) (_ map[int64]squashfsFile, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	var s squashfsSuper
	if err := binary.Read(f, binary.LittleEndian, &s); err != nil {
		return nil, fmt.Errorf("read squashfs superblock: %w", err)
	}
	if s.Magic != squashfsMagic || s.Major != 4 || s.Compression != squashfsZstd || s.FolderTable-s.InodeTable > squashfsMaxTable {
		return nil, fmt.Errorf("magic %x, version %d, compression %d: not the squashfs that was made", s.Magic, s.Major, s.Compression)
	}
	table, err := squashfsMetadata(io.NewSectionReader(f, int64(s.InodeTable), int64(s.FolderTable-s.InodeTable)))
	if err != nil {
		return nil, fmt.Errorf("read squashfs inodes: %w", err)
	}
	files := map[int64]squashfsFile{}
	for range s.Inodes {
		n, size, sizes, err := squashfsInode(table, s.BlockBytes)
		if err != nil {
			return nil, err
		}
		file := squashfsFile{blockBytes: int64(s.BlockBytes), blocks: []int64{}}
		for ; len(sizes) > 0; sizes = sizes[4:] {
			file.blocks = append(file.blocks, int64(binary.LittleEndian.Uint32(sizes)&(squashfsPlain-1)))
		}
		files[size] = file
		table = table[n:]
	}
	return files, nil
}

// squashfsMetadata unpacks a table of blocks with two bytes of length before each.
func squashfsMetadata(r io.Reader) (table []byte, err error) {
	d, err := zstd.NewReader(nil)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	for {
		var length uint16
		if err := binary.Read(r, binary.LittleEndian, &length); err == io.EOF {
			return table, nil
		} else if err != nil {
			return nil, err
		}
		block := make([]byte, min(length&0x7fff, squashfsMetaMax))
		if _, err := io.ReadFull(r, block); err != nil {
			return nil, err
		}
		if length&0x8000 != 0 {
			table = append(table, block...)
			continue
		}
		if table, err = d.DecodeAll(block, table); err != nil {
			return nil, err
		}
	}
}

// squashfsInode tells the length of the first inode in the table, the size of its file
// and the list of block sizes. A folder has neither.
func squashfsInode(t []byte, blockBytes uint32) (n, size int64, sizes []byte, err error) {
	le := binary.LittleEndian
	if len(t) < 56 {
		t = append(t[:len(t):len(t)], make([]byte, 56-len(t))...) // the last one may be shorter
	}
	var fragment uint32
	switch kind := le.Uint16(t); kind {
	case 1: // folder
		return 32, -1, nil, nil
	case 2: // file
		n, size, fragment = 32, int64(le.Uint32(t[28:])), le.Uint32(t[20:])
	case 9: // file, with more room
		n, size, fragment = 56, int64(le.Uint64(t[24:])), le.Uint32(t[44:])
	default:
		return 0, 0, nil, fmt.Errorf("squashfs inode of type %d: only files and their folder are expected", kind)
	}
	blocks := size / int64(blockBytes)
	if fragment == 1<<32-1 && size%int64(blockBytes) != 0 {
		blocks++
	}
	if blocks < 0 || blocks*4 > int64(len(t))-n {
		return 0, 0, nil, fmt.Errorf("squashfs file of %d bytes: its block list ends early", size)
	}
	return n + blocks*4, size, t[n : n+blocks*4], nil
}
