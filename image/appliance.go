// Package image says what a release is: the types that the builder writes and
// the device reads. Making one is image/build's work; parsing what a person
// wrote is image/spec's. This package is linked into the device binary, so it
// imports nothing heavier than encoding/json.
package image

// Where things lie in a release's root file system and initrd.
const (
	// AgentPath is the device binary, in the root and (as /init too) in the initrd.
	AgentPath = "/usr/lib/holdfast/holdfast-agent"
	// AppliancePath is the [Appliance] in the root, as JSON.
	AppliancePath = "/usr/lib/holdfast/appliance.json"
	// TUFRootPath is the root.json of the update repository in the root, with which
	// a device begins to trust it (package update). It is there when the spec has one.
	TUFRootPath = "/usr/lib/holdfast/tuf-root.json"
	// FleetKeyPath is an age identity in the root, mode 0600, with which a device opens
	// bundles that are encrypted to its fleet. It is there when the spec has one.
	//
	// It keeps who carries a bundle from reading the vendor's programs in it, and
	// nobody else: the root is verified and not encrypted, so that whoever can read a
	// release, on a device's disk, in the build's output, in a repository on a web
	// server or in a bundle that is not encrypted, can read this key and open every
	// bundle of the fleet. A release with another key ends that for later bundles.
	// Who has the key can install nothing.
	FleetKeyPath = "/usr/lib/holdfast/fleet.key"
	// BootPath is the [Boot] in the initrd, as JSON.
	BootPath = "/boot.json"
	// AuthorisationPath, on the ESP, is where a box of the policy rollback-proof takes the
	// vendor's permission for a downgrade from: signatures in the form of systemd's
	// tpm2-pcr-signature.json, of an older release's PCR 11 for the epoch that the box has
	// come to (holdfast keys downgrade). They are not secret and authenticate themselves;
	// anybody may put the file there, on a running box (holdfast-agent downgrade) or on a
	// bench, where the ESP is a FAT file system like any other.
	AuthorisationPath = "holdfast/downgrade.json"
	// ContainersPath holds one folder a container: onboot/NNN-NAME, services/NAME,
	// onshutdown/NNN-NAME, each with config.json (OCI runtime) and rootfs/.
	ContainersPath = "/containers"
)

// Appliance is what the device has to know of its release at run time, fixed
// by the build and measured or verified before it is read.
type Appliance struct {
	Format       int    `json:"format"` // 1
	Name         string `json:"name"`
	Version      string `json:"version"`
	Architecture string `json:"architecture"` // GOARCH
	// BuildTimeSec bounds the clock from below: no later than this was the release made. Unix seconds.
	BuildTimeSec int64  `json:"build_time_sec"`
	Hostname     string `json:"hostname,omitempty"`

	Volumes []Volume `json:"volumes,omitempty"`
	// EncryptSlots has the slots be encrypted with a key that lies on the volumes.
	EncryptSlots bool       `json:"encrypt_slots,omitempty"`
	Seal         SealPolicy `json:"seal"`
	// Recovery is about the key that opens the volumes without the TPM.
	Recovery Recovery `json:"recovery,omitzero"`
	// SecureBoot is about the firmware's keys.
	SecureBoot SecureBoot `json:"secureboot,omitzero"`

	Network []Interface `json:"network,omitempty"`
	Sysctl  []string    `json:"sysctl,omitempty"` // "net.ipv4.ip_forward=1"

	OnBoot     []Container `json:"onboot,omitempty"`     // run in order, each must exit 0
	Services   []Container `json:"services,omitempty"`   // run side by side
	OnShutdown []Container `json:"onshutdown,omitempty"` // run in reverse order
	// Update is zero in a release that takes no updates.
	Update Update `json:"update,omitzero"`
	// Evidence says what the box may tell its vendor.
	Evidence Evidence `json:"evidence,omitzero"`
	// Handoff, when set, is the argv of the image's own init: the agent prepares
	// the root and the volumes and then becomes it.
	Handoff []string `json:"handoff,omitempty"`
}

// Boot is what the initrd needs before it can trust the root.
type Boot struct {
	Appliance Appliance `json:"appliance"`
	Root      Verity    `json:"root"`
	// Modules are kernel modules in load order, as paths inside the initrd.
	Modules []string `json:"modules,omitempty"`
}

// Verity describes a dm-verity protected root: DataBlocks blocks of 4096 bytes,
// the superblock of the tree right behind them (hash area offset =
// DataBlocks*4096), SHA-256.
type Verity struct {
	RootHash   string `json:"root_hash"` // hex, 64 digits
	Salt       string `json:"salt"`      // hex
	UUID       string `json:"uuid"`
	DataBlocks int64  `json:"data_blocks"`
	// TotalBytes is data, superblock and tree.
	TotalBytes int64 `json:"total_bytes"`
}

// Volume is an encrypted data volume.
type Volume struct {
	Name  string `json:"name"`  // GPT partition name, dm name and file system label
	Mount string `json:"mount"` // absolute path in the root
	// SizeBytes is 0 for the last volume, which grows to the end of the disk.
	SizeBytes int64 `json:"size_bytes,omitempty"`
	// Integrity is what each sector is checked with when it is read: "hmac-sha256", or
	// "" for nothing. It holds for volumes that are made; those that exist stay as they are.
	Integrity string `json:"integrity,omitempty"`
}

// SealPolicy names who may open the data volumes.
type SealPolicy struct {
	Policy string `json:"policy"` // "standard", "strict", "rollback-proof" or "disk-theft-only"
	// PolicyKeyPEM is the vendor's public key for signed PCR 11 policies.
	PolicyKeyPEM string `json:"policy_key_pem"`
	// PIN asks for a PIN at every boot too.
	PIN bool `json:"pin,omitempty"`
	// Repair is "manual" where nothing is sealed anew by itself after the recovery
	// key had to be used; "automatic" and "" are that it is.
	Repair string `json:"repair,omitempty"`
	// Epoch is the security epoch of a rollback-proof release, 1 or more; 0 in others.
	Epoch int64 `json:"epoch,omitempty"`
}

// SecureBoot says which keys decide in a box's firmware, and how a release changes them.
type SecureBoot struct {
	// Enroll is "force" where the device enrols the vendor's keys by itself, "manual"
	// where they are on the disk; the firmware may still have others, or none.
	Enroll string `json:"enroll,omitempty"`
	// Keys are the vendor's certificates by variable ("PK", "KEK", "db"): SHA-256 of
	// the DER, in hex. The one in db signed this release.
	Keys map[string]string `json:"keys,omitempty"`
	// Updates are applied in this order, one a boot.
	Updates []VariableUpdate `json:"updates,omitempty"`
}

// VariableUpdate is a signed update of db or dbx in the root.
type VariableUpdate struct {
	Variable string `json:"variable"` // "db" or "dbx"
	// Append adds to what the box has; otherwise it is replaced.
	Append bool   `json:"append,omitempty"`
	File   string `json:"file"`   // in the root, below [SecureBootFolder]
	SHA256 string `json:"sha256"` // of the file, hex
}

// EnrolmentPath holds, in the initrd, the signed variables PK.auth, KEK.auth and db.auth
// of a release whose spec has secureboot.enroll force.
const EnrolmentPath = "/secureboot"

// SecureBootFolder holds the files of [SecureBoot].Updates in the root.
const SecureBootFolder = "/usr/lib/holdfast/secureboot"

// Update says where new releases come from and when they are taken. The keys they
// are signed with are in the file at [TUFRootPath], not here.
type Update struct {
	// URL is the repository's, https, http or oci (see [ParseRegistry]); empty is none,
	// and releases come by hand only.
	URL     string `json:"url,omitempty"`
	Channel string `json:"channel,omitempty"` // never empty when there is a root
	// CAPEM, when set, are the certificates that the server's is judged by, instead of the usual ones.
	CAPEM string `json:"ca_pem,omitempty"`
	// CheckSec is the time from one check to the next; 0 is never.
	CheckSec int64 `json:"check_sec,omitempty"`
	// The device restarts into a new release between WindowStartMin and
	// WindowEndMin, minutes after midnight UTC; the window may span midnight. Equal is any time.
	WindowStartMin int `json:"window_start_min,omitempty"`
	WindowEndMin   int `json:"window_end_min,omitempty"`
	// Automatic installs what a check finds; otherwise somebody has to say so.
	Automatic bool `json:"automatic,omitempty"`
	// Stick takes releases from a medium that is plugged in.
	Stick bool `json:"stick,omitempty"`
	// WriteBack writes the outcome of an update to the medium it came from.
	WriteBack bool `json:"write_back,omitempty"`
	// Epoch is the security epoch; a device never goes to a release with a lower one.
	Epoch    int64  `json:"epoch,omitempty"`
	Hardware string `json:"hardware,omitempty"` // the model, for releases that are not for all
}

// Interface is the configuration of one network device.
type Interface struct {
	Name      string   `json:"name"` // "eth0"; "*" is the first one with a link
	DHCP      bool     `json:"dhcp,omitempty"`
	Addresses []string `json:"addresses,omitempty"` // CIDR
	Gateway   string   `json:"gateway,omitempty"`
	DNS       []string `json:"dns,omitempty"`
}

// Container is one onboot, service or onshutdown entry.
type Container struct {
	Name string `json:"name"`
	// Bundle is the OCI runtime bundle's folder in the root. Its rootfs is read-only;
	// unless ReadOnly is set a tmpfs lies over it while the container runs.
	Bundle string `json:"bundle"`
	// Digest is that of the image it was made of ("sha256:…").
	Digest   string   `json:"digest,omitempty"`
	ReadOnly bool     `json:"readonly,omitempty"`
	Mkdir    []string `json:"mkdir,omitempty"` // folders made on the host before the start
	// Restart is "always" (the default for services), "on-failure" or "never".
	Restart string  `json:"restart,omitempty"`
	Health  *Health `json:"health,omitempty"`
}

// Health is how the agent finds out that a service works. Exactly one of HTTP,
// TCP and Exec is set.
type Health struct {
	HTTP string   `json:"http,omitempty"` // URL; 2xx is healthy
	TCP  string   `json:"tcp,omitempty"`  // host:port; a connection is healthy
	Exec []string `json:"exec,omitempty"` // argv inside the container; exit 0 is healthy
	// IntervalSec, TimeoutSec and Retries have the defaults 10, 5 and 3.
	IntervalSec int `json:"interval_sec,omitempty"`
	TimeoutSec  int `json:"timeout_sec,omitempty"`
	Retries     int `json:"retries,omitempty"`
	// StartSec is how long after its start a service may be unhealthy; default 60.
	StartSec int `json:"start_sec,omitempty"`
}
