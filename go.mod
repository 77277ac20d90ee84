module github.com/holdfast-os/holdfast

go 1.26.0

// Every direct requirement says what we would have to write without it.
require (
	// recovery escrow keys and encrypted update bundles: file encryption to several recipients.
	filippo.io/age v1.3.2
	// device-mapper ioctls for dm-verity and dm-crypt, and a crypt in user space for tests.
	github.com/anatol/devmapper.go v0.0.0-20230829043248-59ac2b9706ba
	// tests only: another LUKS2 reader as judge of ours.
	github.com/anatol/luks.go v0.0.0-20250316021219-8cd744c3576f
	// the ext4 of a new data volume.
	github.com/diskfs/go-diskfs v1.9.4
	// PKCS #7 of Authenticode and of UEFI variables, reproducible.
	github.com/foxboron/go-uefi v0.0.0-20251010190908-d29549a44f29
	// registries, credentials and OCI manifests.
	github.com/google/go-containerregistry v0.22.1
	// tests only: event logs of real machines, and a second opinion on their replay.
	github.com/google/go-eventlog v0.0.2
	// TPM 2.0 commands and structures.
	github.com/google/go-tpm v0.9.8
	// GUID text and byte order of EFI signature lists.
	github.com/google/uuid v1.6.0
	// the DHCPv4 client: packets, raw sockets and retransmission.
	github.com/insomniacslk/dhcp v0.0.0-20260901064844-234b97448fae
	// zstd and a fast gzip for layers, packages and the initrd.
	github.com/klauspost/compress v1.20.3
	// digests of OCI descriptors.
	github.com/opencontainers/go-digest v1.0.0
	// the types of OCI image layouts.
	github.com/opencontainers/image-spec v1.1.1
	// the types of the OCI runtime's config.json.
	github.com/opencontainers/runtime-spec v1.3.0
	// tests only: testscript, the command line tests.
	github.com/rogpeppe/go-internal v1.16.0
	// canonical JSON of TUF signatures, where the key is behind a crypto.Signer.
	github.com/secure-systems-lab/go-securesystemslib v0.11.0
	// TUF: the metadata of update repositories and its verification.
	github.com/theupdateframework/go-tuf/v2 v2.4.2
	// xz, which Debian packages and kernel modules are compressed with.
	github.com/ulikunitz/xz v0.5.17
	// the signature of a CoRIM: COSE_Sign1, its headers and what is signed.
	github.com/veraison/go-cose v1.3.0
	// network links, addresses and routes.
	github.com/vishvananda/netlink v1.3.1
	// YAML with line and column of every node.
	go.yaml.in/yaml/v3 v3.0.6
	// argon2, PBKDF2 and XTS of LUKS2.
	golang.org/x/crypto v0.58.0
	// system calls: mount, reboot, modules, ioctls.
	golang.org/x/sys v0.49.0
	// whether a person watches, and a raw terminal for the console of run.
	golang.org/x/term v0.47.0
	// the wire format of go-tpm-tools' attestations, which are protobuf.
	google.golang.org/protobuf v1.36.11
	// the QR code of a recovery key on the console: Reed-Solomon, masks and placement.
	rsc.io/qr v0.2.0
)

require (
	filippo.io/hpke v0.4.0 // indirect
	github.com/cenkalti/backoff/v5 v5.0.3 // indirect
	github.com/dgryski/go-camellia v0.0.0-20191119043421-69a8a13fb23d // indirect
	github.com/docker/cli v29.7.2+incompatible // indirect
	github.com/docker/docker-credential-helpers v0.9.3 // indirect
	github.com/fxamacker/cbor/v2 v2.5.0 // indirect
	github.com/google/go-cmp v0.7.0 // indirect
	github.com/josharian/native v1.1.0 // indirect
	github.com/jzelinskie/whirlpool v0.0.0-20201016144138-0675e54bb004 // indirect
	github.com/mdlayher/packet v1.1.2 // indirect
	github.com/mdlayher/socket v0.5.0 // indirect
	github.com/pierrec/lz4/v4 v4.1.26 // indirect
	github.com/sigstore/protobuf-specs v0.5.0 // indirect
	github.com/sigstore/sigstore v1.10.6 // indirect
	github.com/sirupsen/logrus v1.9.4 // indirect
	github.com/u-root/uio v0.0.0-20230305220412-3e8cd9d6bf63 // indirect
	github.com/vishvananda/netns v0.0.5 // indirect
	github.com/x448/float16 v0.8.4 // indirect
	golang.org/x/net v0.60.0 // indirect
	golang.org/x/sync v0.24.0 // indirect
	golang.org/x/tools v0.49.0 // indirect
	google.golang.org/genproto/googleapis/api v0.0.0-20250825161204-c5933d9347a5 // indirect
	gotest.tools/v3 v3.5.2 // indirect
)
