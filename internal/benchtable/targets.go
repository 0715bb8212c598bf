package main

import (
	"fmt"
	"strings"
)

// target is a figure that the project has set itself.
type target struct {
	what     string
	measured float64
	ok       bool // measured at all
	bound    float64
	most     bool // bound is the most, not the least
	unit     string
}

// verdict says whether it was met, or by how much not.
func (t target) verdict() string {
	switch {
	case !t.ok:
		return "not measured"
	case t.most && t.measured <= t.bound, !t.most && t.measured >= t.bound:
		return "met"
	case t.most && t.bound > 0:
		return fmt.Sprintf("missed: %.1f times as much", t.measured/t.bound)
	case t.most:
		return "missed"
	}
	return fmt.Sprintf("missed: %.0f %% of it", 100*t.measured/t.bound)
}

func (t target) cells() []string {
	bound, measured := "at least ", "-"
	if t.most {
		bound = "at most "
	}
	if t.ok {
		measured = figure(t.measured) + t.unit
	}
	return []string{t.what, bound + figure(t.bound) + t.unit, measured, t.verdict()}
}

func figure(v float64) string {
	if v >= 100 {
		return count(v)
	}
	return strings.TrimSuffix(ratio(v), ".00")
}

// targets is the list of what the suite must show.
func (r *results) targets(b *strings.Builder) {
	b.WriteString("What is to be reached, and what was measured:\n\n")
	head(b, "Target", "Bound", "Measured", "Verdict")
	for _, list := range [][]target{r.requestTargets(), r.flatTargets(), r.packetTargets(), r.costTargets()} {
		for _, t := range list {
			row(b, t.cells()...)
		}
	}
}

// per returns a target for the ratio of two measurements.
func (r *results) per(what, one, other string, least float64) target {
	a, ok := r.value(one)
	c, found := r.value(other)
	return target{what: what, measured: a / c, ok: ok && found && c > 0, bound: least}
}

// least returns a target for a ratio that was measured round by round.
func (r *results) least(what, name string, least float64) target {
	v, ok := r.value(name)
	return target{what: what, measured: v, ok: ok, bound: least}
}

func (r *results) requestTargets() (list []target) {
	const relaxed, sync = "requests/relaxed/100000/", "requests/sync/100000/"
	for _, op := range []string{"create", "renew"} {
		list = append(list,
			r.least(op+", relaxed, 256 outstanding, 100,000 mappings: of the ANNOUNCE rate", relaxed+"256/"+op+"/of-announce", 0.5),
			r.per(op+", the same: of the kernel's bulk rate", relaxed+"256/"+op+"/rate", "bulk/1000/rate", 0.1),
			r.least(op+", sync: of the ANNOUNCE rate", sync+"256/"+op+"/of-announce", 0.25))
	}
	p99, ok := r.value(sync + "half/p99")
	return append(list, target{what: "sync, p99 at half of that load", measured: p99 / 1000, ok: ok, bound: 10, most: true, unit: " ms"})
}

func (r *results) flatTargets() (list []target) {
	const million, thousand = "requests/relaxed/1000000/256/", "requests/relaxed/1000/256/"
	for _, op := range []string{"create", "renew", "delete"} {
		list = append(list, r.per(op+" at 1,000,000 mappings: of the rate at 1,000", million+op+"/rate", thousand+op+"/rate", 0.85))
	}
	for _, op := range []string{"create", "renew"} {
		list = append(list, r.per(op+" at 10,000 mappings: times miniupnpd's at 5,000", "requests/relaxed/10000/256/"+op+"/rate", "miniupnpd/5000/"+op+"/rate", 1000))
	}
	return list
}

func (r *results) packetTargets() (list []target) {
	n := r.top("packets")
	for _, state := range []struct {
		name, what string
		least      float64
	}{{"new", "new flows", 0.95}, {"established", "packets of established flows", 0.97}} {
		for _, kind := range []string{"ordinary", "mapped", "inward"} {
			t := target{what: fmt.Sprintf("%s, %s, %s mappings: of a bare router's", state.what, kind, count(float64(n))), bound: state.least}
			for _, protocol := range []string{"udp", "tcp"} { // the worse one counts
				if v, ok := r.value("packets", n, state.name, protocol, kind, "ratio"); ok && (!t.ok || v < t.measured) {
					t.measured, t.ok = v, true
				}
			}
			list = append(list, t)
		}
	}
	return list
}

func (r *results) costTargets() (list []target) {
	for _, op := range []string{"create", "renew"} {
		v, ok := r.value("lone", op, "ratio")
		list = append(list, target{what: "a lone " + op + ": times its transaction and a datagram there and back", measured: v, ok: ok, bound: 3, most: true})
	}
	n := r.top("requests/relaxed")
	perMapping, ok := r.value("requests/relaxed", n, "rss-per-mapping")
	garbage, found := r.value("requests/relaxed/100000/garbage-per-renewal")
	return append(list,
		target{what: "RSS per mapping, " + count(float64(n)) + " mappings", measured: perMapping, ok: ok, bound: 400, most: true, unit: " octets"},
		target{what: "allocated for a renewal", measured: garbage, ok: found, bound: 0, most: true, unit: " octets"})
}
