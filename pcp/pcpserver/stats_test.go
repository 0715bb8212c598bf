package pcpserver_test

import (
	"errors"
	"maps"
	"strings"
	"testing"

	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// What strangers make up is one row, whatever they make up.
func TestStatsHaveFewRows(t *testing.T) {
	s := newServer(t)
	for op := range 128 {
		b := request{iport: 80, lifetime: 300}.bytes()
		b[1] = byte(op)
		s.raw(client, b)
	}
	s.ok(request{iport: 80, lifetime: 300, opts: options(filter(128, 1, remote), option(128, 'x'), option(200), option(201), option(255))})
	s.refused(request{iport: 80, lifetime: 300, opts: option(77)}, pcp.ResultUnsuppOption)
	st := s.Stats(s.now)
	if want := map[string]uint64{"ANNOUNCE": 1, "MAP": 3, "PEER": 1, "other": 125}; !maps.Equal(st.Operations, want) {
		t.Errorf("operations are %v, want %v", st.Operations, want)
	}
	if want := map[string]uint64{"FILTER": 1, "DESCRIPTION": 1, "other": 4}; !maps.Equal(st.Options, want) {
		t.Errorf("options are %v, want %v", st.Options, want)
	}
	if len(st.Results) > 14 {
		t.Errorf("results are %v", st.Results)
	}
}

// The option list has names as long as package pcp has them.
func TestStatsNameEveryKnownOption(t *testing.T) {
	s := newServer(t)
	for code := range 256 {
		s.raw(client, request{iport: 80, lifetime: 300, opts: option(byte(code))}.bytes())
	}
	got := s.Stats(s.now).Options
	for code := range 256 {
		name := pcp.OptionCode(code).String()
		if _, ok := got[name]; ok == strings.HasPrefix(name, "OPTION(") {
			t.Errorf("option %d, %s, has a row: %v", code, name, ok)
		}
	}
}

// Values without a name are written, not a reason to die.
func TestUnknownNames(t *testing.T) {
	for got, want := range map[string]string{
		pcpserver.EventMoved.String():      "moved",
		pcpserver.EventWaiting.String():    "waiting",
		pcpserver.EventKind(6).String():    "event(6)",
		pcpserver.EventKind(255).String():  "event(255)",
		pcpserver.DropSubscriber.String():  "subscriber",
		pcpserver.DropReason(255).String(): "drop(255)",
		pcpserver.DropQueue.String():       "queue",
		(pcpserver.DropQueue + 1).String(): "drop(6)",
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// What is stored is to be put back one day.
func TestStoreNeedsRestorer(t *testing.T) {
	cfg := pcpserver.Config{Services: []pcpserver.Service{{Type: pcpserver.TypeFW4, Device: mapperOnly{newDevice(true)}}}}
	if _, err := pcpserver.New(cfg, start); err != nil {
		t.Fatal(err)
	}
	cfg.Store = newMemory()
	if _, err := pcpserver.New(cfg, start); !errors.Is(err, pcpserver.ErrInvalid) || !strings.Contains(err.Error(), "Restorer") {
		t.Errorf("error is %v", err)
	}
}
