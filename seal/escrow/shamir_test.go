package escrow

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	mathrand "math/rand/v2"
	"testing"
)

// TestField checks the arithmetic against the definition, and FIPS 197 §4.2's example.
func TestField(t *testing.T) {
	if got := mul(0x57, 0x83); got != 0xc1 {
		t.Errorf("{57}·{83} = %#x, want {c1}", got)
	}
	slow := func(a, b byte) byte {
		p := uint(0)
		for i := range 8 {
			if b>>i&1 == 1 {
				p ^= uint(a) << i
			}
		}
		for i := 14; i >= 8; i-- {
			if p>>i&1 == 1 {
				p ^= 0x11b << (i - 8)
			}
		}
		return byte(p)
	}
	for a := range 256 {
		for b := range 256 {
			if got, want := mul(byte(a), byte(b)), slow(byte(a), byte(b)); got != want {
				t.Fatalf("%#x·%#x = %#x, want %#x", a, b, got, want)
			}
		}
		if want := byte(min(a, 1)); mul(byte(a), inverse(byte(a))) != want {
			t.Errorf("the inverse of %#x is %#x", a, inverse(byte(a)))
		}
	}
}

// subsets calls each with every choice of m of the numbers 0 to n-1.
func subsets(n, m int, each func(chosen []int)) {
	for mask := range 1 << n {
		var chosen []int
		for i := range n {
			if mask>>i&1 == 1 {
				chosen = append(chosen, i)
			}
		}
		if len(chosen) == m {
			each(chosen)
		}
	}
}

func pick(shares [][]byte, chosen []int) (xs []byte, values [][]byte) {
	for _, i := range chosen {
		xs, values = append(xs, byte(i+1)), append(values, shares[i])
	}
	return xs, values
}

// TestEverySubsetRestores: any m of n shares give the secret back, in any order, for
// every m and n there can be.
func TestEverySubsetRestores(t *testing.T) {
	random := mathrand.NewChaCha8([32]byte{1})
	for n := 1; n <= MaxHolders; n++ {
		for m := 1; m <= n; m++ {
			secret := make([]byte, 3)
			random.Read(secret)
			shares, err := split(secret, m, n, random)
			if err != nil {
				t.Fatal(err)
			}
			tried := 0
			subsets(n, m, func(chosen []int) {
				if tried++; tried > 500 {
					return
				}
				mathrand.New(random).Shuffle(m, func(i, j int) { chosen[i], chosen[j] = chosen[j], chosen[i] })
				if got := combine(pick(shares, chosen)); !bytes.Equal(got, secret) {
					t.Fatalf("%d of %d, shares %v: %x, want %x", m, n, chosen, got, secret)
				}
			})
		}
	}
}

// TestTooFewSayNothing: over all polynomials, the m-1 values that a group of holders
// has are spread alike for every secret: each set of values comes exactly as often.
// This is exhaustive for thresholds 2 and, over a part of the secrets, 3.
func TestTooFewSayNothing(t *testing.T) {
	for _, secret := range []byte{0, 1, 0x53, 0xff} {
		for x := range 5 {
			var seen [256]int
			for c := range 256 {
				shares, err := split([]byte{secret}, 2, 5, bytes.NewReader([]byte{byte(c)}))
				if err != nil {
					t.Fatal(err)
				}
				seen[shares[x][0]]++
			}
			for y, n := range seen {
				if n != 1 {
					t.Fatalf("secret %#x: share %d is %#x for %d of 256 polynomials", secret, x+1, y, n)
				}
			}
		}
	}
	for _, secret := range []byte{0, 0xa7} {
		var seen [1 << 16]byte
		for c := range 1 << 16 {
			shares, err := split([]byte{secret}, 3, 4, bytes.NewReader([]byte{byte(c >> 8), byte(c)}))
			if err != nil {
				t.Fatal(err)
			}
			seen[int(shares[1][0])<<8|int(shares[3][0])]++
		}
		for pair, n := range seen {
			if n != 1 {
				t.Fatalf("secret %#x: shares 2 and 4 are %#04x for %d of 65536 polynomials", secret, pair, n)
			}
		}
	}
}

// TestEveryGuessFits: with m-1 shares, for any key that somebody may guess there are
// shares of the others with which it comes out: there is nothing to test a guess by.
// (Not "up to the checksum": that is shared like the key, and fits any guess too.)
func TestEveryGuessFits(t *testing.T) {
	for m := 2; m <= 6; m++ {
		secret := make([]byte, secretBytes)
		rand.Read(secret)
		shares, err := split(secret, m, 6, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		subsets(6, m-1, func(chosen []int) {
			guess := make([]byte, secretBytes)
			rand.Read(guess)
			xs, values := pick(shares, chosen)
			// The polynomial through the known shares and the guess at 0 gives a share
			// for any other holder.
			var other int
			for other = range 6 {
				if !bytes.Contains(xs, []byte{byte(other + 1)}) {
					break
				}
			}
			forged := interpolate(append(xs, 0), append(values, guess), byte(other+1))
			if got := combine(append(xs, byte(other+1)), append(values, forged)); !bytes.Equal(got, guess) {
				t.Fatalf("threshold %d, shares %v: the guess does not fit", m, chosen)
			}
		})
	}
}

func TestSplitWithoutRandomness(t *testing.T) {
	if _, err := split(make([]byte, 8), 3, 4, io.LimitReader(rand.Reader, 15)); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("error %v", err)
	}
	shares, err := split([]byte("alone"), 1, 3, bytes.NewReader(nil))
	if err != nil || string(shares[2]) != "alone" {
		t.Errorf("%q, %v", shares, err)
	}
}
