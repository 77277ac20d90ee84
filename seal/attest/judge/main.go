// Command judge asks go-tpm-tools and go-attestation what they think of an
// attestation: a serialized attest.Attestation on standard input, the nonce in hex as
// the argument. It prints what they read out of the event log as JSON. With the argument
// "log" the input is an event log, and it prints whether go-attestation takes Secure Boot
// for on: true, false, or why it cannot tell. It is a module of its own, because of all
// that they import; the tests of packages attest and tpmtools run it.
package main

import (
	"crypto"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"

	goattest "github.com/google/go-attestation/attest"
	pb "github.com/google/go-tpm-tools/proto/attest"
	"github.com/google/go-tpm-tools/server"
	"github.com/google/go-tpm/legacy/tpm2"
	"google.golang.org/protobuf/proto"
)

func main() {
	do := judge
	if len(os.Args) == 2 && os.Args[1] == "log" {
		do = judgeLog
	}
	if err := do(); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

// judgeLog replays nothing: the log is of a machine that is not here.
func judgeLog() error {
	in, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	log, err := goattest.ParseEventLog(in)
	if err != nil {
		_, err = fmt.Println(err)
		return err
	}
	state, err := goattest.ParseSecurebootState(log.Events(goattest.HashSHA256))
	if err != nil {
		_, err = fmt.Println(err)
		return err
	}
	_, err = fmt.Println(state.Enabled)
	return err
}

// opinion is what they say.
type opinion struct {
	SecureBoot bool   `json:"secure_boot"`
	Events     int    `json:"events"`
	AKPub      string `json:"ak_pub"` // what go-tpm-tools read and wrote again
	Same       bool   `json:"same"`   // the bytes it would write are those it read
}

func judge() error {
	in, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	nonce, err := hex.DecodeString(os.Args[1])
	if err != nil {
		return err
	}
	var a pb.Attestation
	if err := proto.Unmarshal(in, &a); err != nil {
		return err
	}
	public, err := tpm2.DecodePublic(a.GetAkPub())
	if err != nil {
		return err
	}
	key, err := public.Key()
	if err != nil {
		return err
	}
	state, err := server.VerifyAttestation(&a, server.VerifyOpts{Nonce: nonce, TrustedAKs: []crypto.PublicKey{key}})
	if err != nil {
		return fmt.Errorf("go-tpm-tools: %w", err)
	}
	log, err := goattest.ParseEventLog(a.GetEventLog())
	if err != nil {
		return fmt.Errorf("go-attestation: %w", err)
	}
	var pcrs []goattest.PCR
	for index, digest := range a.GetQuotes()[0].GetPcrs().GetPcrs() {
		pcrs = append(pcrs, goattest.PCR{Index: int(index), Digest: digest, DigestAlg: 5}) // crypto.SHA256
	}
	events, err := log.Verify(pcrs)
	if err != nil {
		return fmt.Errorf("go-attestation: %w", err)
	}
	again, err := proto.MarshalOptions{Deterministic: true}.Marshal(&a)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(opinion{
		SecureBoot: state.GetSecureBoot().GetEnabled(), Events: len(events), AKPub: hex.EncodeToString(a.GetAkPub()), Same: string(again) == string(in),
	})
}
