package escrow

import (
	"fmt"
	"io"

	"github.com/holdfast-os/holdfast/seal/luks2"
)

// Shamir's scheme ("How to Share a Secret", 1979) for each byte over GF(2^8), with
// the polynomial of AES. It is short enough to have here: the modules there are
// would bring more code that nobody keeps up, or a whole product, or tables, which the cache gives away.

// split makes n shares of the secret, of which any m restore it: share i is the value
// at x = i+1 of polynomials of degree m-1 with the secret at 0. 1 <= m <= n <= 255.
func split(secret []byte, m, n int, random io.Reader) ([][]byte, error) {
	coefficients := make([]byte, (m-1)*len(secret))
	defer luks2.Wipe(coefficients)
	if _, err := io.ReadFull(random, coefficients); err != nil {
		return nil, fmt.Errorf("read randomness: %w", err)
	}
	shares := make([][]byte, n)
	for i := range shares {
		shares[i] = make([]byte, len(secret))
		for j, constant := range secret {
			var y byte
			for _, c := range coefficients[j*(m-1) : (j+1)*(m-1)] {
				y = mul(y^c, byte(i+1)) // Horner
			}
			shares[i][j] = y ^ constant
		}
	}
	return shares, nil
}

// combine is the value at 0 of the polynomials through these points. The xs differ
// and none is 0; the shares have one length.
func combine(xs []byte, shares [][]byte) []byte { return interpolate(xs, shares, 0) }

// interpolate is Lagrange's formula at x.
func interpolate(xs []byte, shares [][]byte, x byte) []byte {
	out := make([]byte, len(shares[0]))
	for i, share := range shares {
		above, below := byte(1), byte(1)
		for j, other := range xs {
			if j != i {
				above, below = mul(above, x^other), mul(below, xs[i]^other)
			}
		}
		weight := mul(above, inverse(below))
		for k, y := range share {
			out[k] ^= mul(weight, y)
		}
	}
	return out
}

// mul multiplies in GF(2^8) modulo x^8+x^4+x^3+x+1, in the same time for all values.
func mul(a, b byte) (p byte) {
	for range 8 {
		p ^= a & -(b & 1)
		a = a<<1 ^ 0x1b&-(a>>7)
		b >>= 1
	}
	return p
}

// inverse is a^254; that of 0 is 0.
func inverse(a byte) byte {
	out := byte(1)
	for range 254 {
		out = mul(out, a)
	}
	return out
}
