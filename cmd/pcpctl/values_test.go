package main

import (
	"testing"
	"time"
)

func TestParseSeconds(t *testing.T) {
	for _, test := range []struct {
		text string
		want time.Duration
		bad  bool
	}{
		{text: "0"}, {text: "3600", want: time.Hour}, {text: "90m", want: 90 * time.Minute},
		{text: "4294967295", want: 4294967295 * time.Second}, {text: "4294967296", bad: true},
		{text: "1194000h", bad: true}, {text: "-1s", bad: true}, {text: "", bad: true}, {text: "1 h", bad: true},
	} {
		got, err := parseSeconds(test.text)
		if got != test.want || (err != nil) != test.bad {
			t.Errorf("%q: %v, %v", test.text, got, err)
		}
	}
}

func TestParseServer(t *testing.T) {
	for _, test := range []struct{ text, want string }{
		{"192.168.1.1", "192.168.1.1:5351"}, {"192.168.1.1:99", "192.168.1.1:99"}, {"::ffff:192.168.1.1", "192.168.1.1:5351"},
		{"2001:db8::1", "[2001:db8::1]:5351"}, {"[2001:db8::1]", "[2001:db8::1]:5351"}, {"[2001:db8::1]:99", "[2001:db8::1]:99"},
		{"fe80::1%eth0", "[fe80::1%eth0]:5351"}, {"[fe80::1%eth0]:99", "[fe80::1%eth0]:99"},
		{"fe80::1", ""}, {"router", ""}, {"1.2.3.4:x", ""}, {"", ""},
	} {
		got, err := parseServer(test.text)
		if (err != nil) != (test.want == "") || err == nil && got[0].String() != test.want {
			t.Errorf("%q: %v, %v", test.text, got, err)
		}
	}
}

func TestParseFilter(t *testing.T) {
	for _, test := range []struct{ text, want string }{
		{"203.0.113.0/24", "203.0.113.0/24"}, {"203.0.113.9/24,53", "203.0.113.0/24,53"}, {"203.0.113.9", "203.0.113.9/32"},
		{"2001:db8::/32,0", "2001:db8::/32"}, {"::/0", "::/0"}, {"0.0.0.0/0,1", "0.0.0.0/0,1"}, {"2001:db8::1,443", "2001:db8::1/128,443"},
		{"203.0.113.0/24,", ""}, {"203.0.113.0/24,65536", ""}, {",53", ""}, {"::ffff:1.2.3.4", ""}, {"fe80::1%eth0/64", ""}, {"", ""},
	} {
		got, err := parseFilter(test.text)
		if (err != nil) != (test.want == "") || err == nil && got.String() != test.want {
			t.Errorf("%q: %v, %v", test.text, got, err)
		}
	}
}

func FuzzValues(f *testing.F) {
	for _, s := range []string{"203.0.113.0/24,53", "::/0", "1.2.3.4:5", "[fe80::1%eth0]:5351", "3600", "2h"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if filter, err := parseFilter(s); err == nil {
			if again, err := parseFilter(filter.String()); err != nil || again != filter {
				t.Errorf("filter %q reads as %v, that as %v, %v", s, filter, again, err)
			}
		}
		if server, err := parseServer(s); err == nil {
			if again, err := parseServer(server[0].String()); err != nil || again[0] != server[0] {
				t.Errorf("server %q reads as %v, that as %v, %v", s, server, again, err)
			}
		}
		if d, err := parseSeconds(s); err == nil && d < 0 {
			t.Errorf("%q is %v", s, d)
		}
	})
}
