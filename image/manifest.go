package image

// The files of a release folder.
const (
	ManifestName = "manifest.json"
	RootName     = "root.img"       // EROFS, then the dm-verity superblock and tree
	UKIName      = "uki.efi"        // signed
	LoaderName   = "bootloader.efi" // systemd-boot, signed
)

// RootHashWord, with the hash in hex behind it, names the root in the kernel
// command line. It is not systemd's roothash=: the generators of a systemd that
// takes the machine over would try to set up the root once more.
const RootHashWord = "holdfast.roothash="

// Manifest describes a release: its parts by digest and the measurements a box
// that runs it will show. The same spec and inputs give the same manifest.
type Manifest struct {
	Format       int    `json:"format"` // 1
	Name         string `json:"name"`
	Version      string `json:"version"`
	Architecture string `json:"architecture"`
	BuildTimeSec int64  `json:"build_time_sec"`
	// Epoch is the security epoch, that of [Update].
	Epoch int64 `json:"epoch,omitempty"`

	Root   File   `json:"root"`
	Verity Verity `json:"verity"`
	UKI    File   `json:"uki"`
	Loader File   `json:"loader"`

	Kernel  string   `json:"kernel"`  // as uname -r prints it
	Cmdline string   `json:"cmdline"` // as it is measured
	Modules []string `json:"modules,omitempty"`

	Expected Expected `json:"expected"`
	// SecureBoot are the changes of db and dbx that a box makes once it keeps the release.
	SecureBoot []VariableUpdate `json:"secureboot,omitempty"`
	// Images are what the release was composed of.
	Images []Source `json:"images"`
	Disk   Geometry `json:"disk"`
}

// File is one part of a release.
type File struct {
	Name      string `json:"name"`
	SizeBytes int64  `json:"size_bytes"`
	SHA256    string `json:"sha256"` // hex
}

// Source is one image a release was composed of.
type Source struct {
	Ref    string `json:"ref"`
	Digest string `json:"digest"` // "sha256:…"; of the content for what has no digest of its own
}

// Expected are reference values for attestation: hex SHA-256 PCR values and the
// digests that are extended.
type Expected struct {
	// PCR11 by boot phase: "" is the stub alone, then "enter-initrd" and
	// "enter-initrd:leave-initrd".
	PCR11 map[string]string `json:"pcr11"`
	// Authenticode digests that the firmware extends into PCR 4 when it starts
	// them. LinuxAuthenticode, of the kernel inside the UKI, is measured only with
	// Secure Boot off.
	LoaderAuthenticode string `json:"loader_authenticode"`
	UKIAuthenticode    string `json:"uki_authenticode"`
	LinuxAuthenticode  string `json:"linux_authenticode,omitempty"`
	// DBCertificateSHA256 is the digest of the DER certificate in db that verifies
	// loader and UKI. With Secure Boot on, the firmware extends its entry in db into
	// PCR 7 (EV_EFI_VARIABLE_AUTHORITY); the entry has an owner too, which is whoever
	// enrolled the certificate in the box.
	DBCertificateSHA256 string `json:"db_certificate_sha256,omitempty"`
	// PCR12 is what command lines, credentials and add-ons from outside the UKI give:
	// none.
	PCR12 string `json:"pcr12,omitempty"`
	// SecureBoot are EFI signature lists (UEFI 2.10 §32.4.1) by variable: all that PK, KEK
	// and db of a box of this vendor may hold, whichever steps of a rotation it has taken,
	// and what dbx holds at least once the box has made the release's changes.
	SecureBoot map[string][]byte `json:"secureboot,omitempty"`
	// UKISections are what the stub measures into PCR 11, in its order: to say which one
	// differs where the register does.
	UKISections []Section `json:"uki_sections,omitempty"`
	// Services are the digests ("sha256:…") of the services' images by their names. They
	// are in the root, so its hash covers them.
	Services map[string]string `json:"services,omitempty"`
	// PolicyKeySHA256 is the fingerprint of the key that signs PCR 11 policies
	// (over its PKCS #1 DER, as in .pcrsig).
	PolicyKeySHA256 string `json:"policy_key_sha256"`
}

// Section is a section of a UKI with the digest of its content, in hex.
type Section struct {
	Name   string `json:"name"` // with the dot
	SHA256 string `json:"sha256"`
}

// Geometry is the disk a release is made for.
type Geometry struct {
	SizeBytes int64    `json:"size_bytes"`
	ESPBytes  int64    `json:"esp_bytes"`
	SlotBytes int64    `json:"slot_bytes"`
	Volumes   []Volume `json:"volumes,omitempty"`
	// EncryptSlots is what [Appliance].EncryptSlots is: how a device writes the release.
	EncryptSlots bool `json:"encrypt_slots,omitempty"`
}
