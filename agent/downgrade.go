package agent

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"time"

	"github.com/holdfast-os/holdfast/image"
	"github.com/holdfast-os/holdfast/partition"
	"github.com/holdfast-os/holdfast/partition/fat32"
	"github.com/holdfast-os/holdfast/seal"
)

// maxAuthorisationBytes is some hundred signatures.
const maxAuthorisationBytes = 256 << 10

func espOf(disk *partition.Disk) (*fat32.FS, error) {
	device, esp, err := disk.Partition(partition.ESPName)
	if err != nil {
		return nil, err
	}
	files, err := fat32.Open(device, esp.SizeBytes)
	if err != nil {
		return nil, fmt.Errorf("ESP: %w", err)
	}
	return files, nil
}

// readAuthorisation is [fs.ErrNotExist] where there is none.
func readAuthorisation(disk *partition.Disk) ([]byte, error) {
	files, err := espOf(disk)
	if err != nil {
		return nil, err
	}
	f, err := files.Open(image.AuthorisationPath)
	if err != nil {
		return nil, err
	}
	if f.Size() > maxAuthorisationBytes {
		return nil, fmt.Errorf("%s on the ESP has %d bytes, at most %d are read", image.AuthorisationPath, f.Size(), maxAuthorisationBytes)
	}
	return io.ReadAll(io.NewSectionReader(f, 0, f.Size()))
}

// writeAuthorisation refuses what no TPM would take.
func writeAuthorisation(disk *partition.Disk, policyKeyPEM, file []byte, now time.Time) (seal.Signatures, error) {
	if len(file) > maxAuthorisationBytes {
		return nil, fmt.Errorf("the authorisation has %d bytes, at most %d are taken", len(file), maxAuthorisationBytes)
	}
	all, err := seal.ParseSignatures(file)
	if err != nil {
		return nil, fmt.Errorf("authorisation of a downgrade: %w", err)
	}
	valid, err := withRef(all).By(policyKeyPEM)
	if err != nil {
		return nil, err
	}
	if len(valid) == 0 {
		return nil, errors.New("the file authorises nothing on this box: none of its signatures is by the vendor's policy key. Innocent: it is damaged, or for another product. Hostile: somebody else made it")
	}
	files, err := espOf(disk)
	if err != nil {
		return nil, err
	}
	return valid, files.WriteFile(image.AuthorisationPath, int64(len(file)), bytes.NewReader(file), now)
}

// withRef are those that are for an epoch: a plain one has no business outside an image.
func withRef(all seal.Signatures) (list seal.Signatures) {
	for _, s := range all {
		if s.Ref != "" {
			list = append(list, s)
		}
	}
	return list
}

// authorised are the vendor's signatures from outside the image. Whatever is wrong with
// them keeps no boot from going on as if there were none.
func (m *Machine) authorised() seal.Signatures {
	if m.Authorisation == nil {
		return nil
	}
	file, err := m.Authorisation()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var list seal.Signatures
	if err == nil {
		list, err = seal.ParseSignatures(file)
	}
	if err != nil {
		m.Log.Warn("authorisation of a downgrade", "error", err)
	}
	return withRef(list)
}

// epochOf is the security epoch that a reference names; 0 is none.
func epochOf(ref string) (epoch uint64) {
	if n, err := fmt.Sscanf(ref, "holdfast-epoch-%d", &epoch); n != 1 || err != nil || seal.EpochRef(epoch) != ref {
		return 0
	}
	return epoch
}
