module github.com/holdfast-os/holdfast/seal/attest/judge

go 1.26.0

require (
	github.com/google/go-attestation v0.6.1
	github.com/google/go-tpm v0.9.8
	github.com/google/go-tpm-tools v0.4.9
	google.golang.org/protobuf v1.36.11
)

require (
	github.com/GoogleCloudPlatform/confidential-space/server v0.0.0-20260522213940-e5c6d01a3007 // indirect
	github.com/google/go-configfs-tsm v0.3.3-0.20240919001351-b4b5b84fdcbc // indirect
	github.com/google/go-eventlog v0.0.3-0.20260416001248-6807b85eecf0 // indirect
	github.com/google/go-sev-guest v0.14.0 // indirect
	github.com/google/go-tdx-guest v0.3.2-0.20250814004405-ffb0869e6f4d // indirect
	github.com/google/logger v1.1.1 // indirect
	github.com/google/uuid v1.6.0 // indirect
	go.uber.org/multierr v1.11.0 // indirect
	golang.org/x/crypto v0.45.0 // indirect
	golang.org/x/sys v0.41.0 // indirect
)
