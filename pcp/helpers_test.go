package pcp_test

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"pcpd/pcp"
)

// golden returns the octets of testdata/golden/name.hex, which were written by
// hand from the RFC's figures or taken from other implementations' tests.
func golden(t testing.TB, name string) []byte {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", "golden", name+".hex"))
	if err != nil {
		t.Fatal(err)
	}
	var digits strings.Builder
	for line := range strings.Lines(string(text)) {
		if !strings.HasPrefix(line, "#") {
			digits.WriteString(strings.Join(strings.Fields(line), ""))
		}
	}
	return unhex(t, digits.String())
}

// goldenNames returns the names of all golden files.
func goldenNames(t testing.TB) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join("testdata", "golden", "*.hex"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no golden files: %v", err)
	}
	for i, f := range files {
		files[i] = strings.TrimSuffix(filepath.Base(f), ".hex")
	}
	return files
}

// unhex decodes hexadecimal digits with spaces anywhere between octets.
func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// edit returns a copy of b with the octets from offset on replaced.
func edit(b []byte, offset int, octets ...byte) []byte {
	b = append([]byte(nil), b...)
	copy(b[offset:], octets)
	return b
}

// join concatenates into memory of its own.
func join(parts ...[]byte) []byte {
	var b []byte
	for _, p := range parts {
		b = append(b, p...)
	}
	return b
}

// outcome names what a parser's error asks for: "" for none, "drop", or the
// result code of the response. Any other error fails the test.
func outcome(t testing.TB, err error) string {
	t.Helper()
	var e *pcp.Error
	switch {
	case err == nil:
		return ""
	case errors.Is(err, pcp.ErrDrop):
		return "drop"
	case errors.As(err, &e) && e.Result != pcp.ResultSuccess && e.Reason != "":
		return e.Result.String()
	}
	t.Fatalf("error %v is neither ErrDrop nor a complete *Error", err)
	return ""
}

// options lists what is left in o.
func options(o pcp.OptionReader) []string {
	var s []string
	for {
		opt, ok := o.Next()
		if !ok {
			return s
		}
		s = append(s, fmt.Sprintf("%s(%x)", opt.Code, opt.Data))
	}
}

// request prints all of r, so that two can be compared and read.
func request(r pcp.Request) string {
	return fmt.Sprintf("version %d %s lifetime %s client %s nonce %s protocol %s internal port %d suggested %s peer %s options %s",
		r.Version, r.Opcode, r.Lifetime, r.Client, r.Nonce.Hex(), r.Protocol, r.InternalPort,
		r.SuggestedExternal, r.RemotePeer, options(r.Options()))
}

// response prints all of r.
func response(r pcp.Response) string {
	return fmt.Sprintf("version %d %s %s lifetime %s epoch %d nonce %s protocol %s internal port %d external %s peer %s options %s",
		r.Version, r.Opcode, r.Result, r.Lifetime, r.Epoch, r.Nonce.Hex(), r.Protocol, r.InternalPort,
		r.External, r.RemotePeer, options(r.Options()))
}

// rawOptions appends the options of o again.
func rawOptions(dst []byte, o pcp.OptionReader) []byte {
	for {
		opt, ok := o.Next()
		if !ok {
			return dst
		}
		dst = pcp.AppendOption(dst, opt.Code, opt.Data)
	}
}

func addr(s string) netip.Addr         { return netip.MustParseAddr(s) }
func addrPort(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }
func seconds(n int64) time.Duration    { return time.Duration(n) * time.Second }

func nonce(t testing.TB, s string) pcp.Nonce {
	t.Helper()
	n, err := pcp.ParseNonce(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
