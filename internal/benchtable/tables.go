package main

import (
	"fmt"
	"strings"
)

var (
	present      = []int{0, 1_000, 10_000, 100_000, 1_000_000}
	durabilities = []string{"none", "relaxed", "sync"}
)

// document is everything, in Markdown.
func (r *results) document() string {
	var b strings.Builder
	fmt.Fprintf(&b, "Medians of one run: %s.\n", r.machine())
	for _, part := range []struct {
		needs string // the beginning of a name
		write func(*strings.Builder)
	}{{"requests/", r.requests}, {"packets/", r.packets}, {"filters/", r.filters}, {"requests/relaxed/", r.memory},
		{"requests/relaxed/", r.starts}, {"storm/", r.storm}, {"lone/", r.lone}, {"", r.targets}} {
		if r.has(part.needs) {
			b.WriteString("\n")
			part.write(&b)
		}
	}
	return b.String()
}

func (r *results) machine() string {
	var parts []string
	for _, name := range []string{"date", "kernel", "cpu", "commit", "load"} {
		if text, ok := r.texts["machine/"+name]; ok {
			parts = append(parts, text)
		}
	}
	return strings.Join(parts, ", ")
}

func row(b *strings.Builder, cells ...string) {
	b.WriteString("| " + strings.Join(cells, " | ") + " |\n")
}

func head(b *strings.Builder, cells ...string) {
	row(b, cells...)
	b.WriteString("|" + strings.Repeat(" --- |", len(cells)) + "\n")
}

func (r *results) requests(b *strings.Builder) {
	b.WriteString("Requests per second with 256 outstanding, each of another client, and in parentheses the 99th\n" +
		"percentile in ms; in the last column the median of a renewal in ms by one client that waits:\n\n")
	head(b, "Durability", "Mappings present", "ANNOUNCE", "MAP create", "renew", "delete", "one client")
	for _, d := range durabilities {
		for _, n := range present {
			if _, ok := r.value("requests", d, n, 256, "renew", "rate"); !ok {
				continue
			}
			cells := []string{d, count(float64(n))}
			for _, op := range []string{"announce", "create", "renew", "delete"} {
				cells = append(cells, fmt.Sprintf("%s (%s)", r.show(rate, "requests", d, n, 256, op, "rate"), r.show(millis, "requests", d, n, 256, op, "p99")))
			}
			row(b, append(cells, r.show(millis, "requests", d, n, 1, "renew", "p50"))...)
		}
	}
	for _, n := range []int{0, 1_000, 5_000} {
		if _, ok := r.value("miniupnpd", n, "renew", "rate"); !ok {
			continue
		}
		cells := []string{"miniupnpd", count(float64(n)), "-"}
		for _, op := range []string{"create", "renew", "delete"} {
			cells = append(cells, fmt.Sprintf("%s (%s)", r.show(rate, "miniupnpd", n, op, "rate"), r.show(millis, "miniupnpd", n, op, "p99")))
		}
		row(b, append(cells, r.show(millis, "miniupnpd", n, "renew", "p50"))...)
	}
	fmt.Fprintf(b, "\nThe kernel alone takes the same elements at %s mappings per second one by one, %s in transactions of\n64 and %s in those of 1,000.\n",
		r.show(rate, "bulk/1/rate"), r.show(rate, "bulk/64/rate"), r.show(rate, "bulk/1000/rate"))
}

func (r *results) packets(b *strings.Builder) {
	b.WriteString("Packets per second through the router, one core, and in parentheses the ratio to a router with\n" +
		"one masquerade rule, rounds in turn. New flows are of sockets without a mapping, of sockets with\n" +
		"one, and from outside to one:\n\n")
	head(b, "Mappings", "Protocol", "new: ordinary", "mapped", "inward", "established: ordinary", "mapped", "inward")
	line := func(who, group string, n int, protocol string) {
		if _, ok := r.value(group, n, "new", protocol, "ordinary", "rate"); !ok {
			return
		}
		cells := []string{who, strings.ToUpper(protocol)}
		for _, state := range []string{"new", "established"} {
			for _, kind := range []string{"ordinary", "mapped", "inward"} {
				cell := "-"
				if _, ok := r.value(group, n, state, protocol, kind, "rate"); ok {
					cell = fmt.Sprintf("%s (%s)", r.show(rate, group, n, state, protocol, kind, "rate"), r.show(ratio, group, n, state, protocol, kind, "ratio"))
				}
				cells = append(cells, cell)
			}
		}
		row(b, cells...)
	}
	for _, n := range present {
		for _, protocol := range []string{"udp", "tcp"} {
			line(count(float64(n)), "packets", n, protocol)
		}
	}
	for _, n := range []int{0, 1_000, 5_000} {
		line("miniupnpd, "+count(float64(n)), "miniupnpd", n, "udp")
	}
}

func (r *results) filters(b *strings.Builder) {
	b.WriteString("Packets per second from a permitted peer to a mapping with filters, and in parentheses the ratio to\none without:\n\n")
	head(b, "Filters", "new flows", "established")
	for _, n := range []int{0, 1, 8, 43} {
		row(b, count(float64(n)), fmt.Sprintf("%s (%s)", r.show(rate, "filters", n, "new/rate"), r.show(ratio, "filters", n, "new/ratio")),
			fmt.Sprintf("%s (%s)", r.show(rate, "filters", n, "established/rate"), r.show(ratio, "filters", n, "established/ratio")))
	}
	fmt.Fprintf(b, "\nA mapping with a filter is made in %s ms (median) where there is no other and in %s ms where there are\n10,000.\n",
		r.show(millis, "filters/0/create/p50"), r.show(millis, "filters/10000/create/p50"))
}

func (r *results) memory(b *strings.Builder) {
	b.WriteString("Memory, in octets per mapping beyond what an idle daemon has:\n\n")
	head(b, "Mappings", "daemon (RSS)", "kernel")
	for _, n := range present {
		if _, ok := r.value("requests/relaxed", n, "rss-per-mapping"); ok {
			row(b, count(float64(n)), r.show(count, "requests/relaxed", n, "rss-per-mapping"), r.show(count, "requests/relaxed", n, "kernel-per-mapping"))
		}
	}
}

func (r *results) starts(b *strings.Builder) {
	n := r.top("requests/relaxed")
	fmt.Fprintf(b, "A start with %s mappings in the store:\n\n", count(float64(n)))
	head(b, "The kernel has", "answers after", "renews after", "reconciled after", "CPU", "RSS")
	for _, kind := range []struct{ name, has string }{{"restart", "the table of before"}, {"boot", "nothing"}} {
		at := func(f func(float64) string, what string) string {
			return r.show(f, "requests/relaxed", n, kind.name, what)
		}
		row(b, kind.has, at(seconds, "answers"), at(seconds, "renews"), at(seconds, "reconciled"), at(seconds, "cpu"), at(mib, "rss"))
	}
}

func (r *results) storm(b *strings.Builder) {
	fmt.Fprintf(b, "After the loss of all state %s renewals of 10,000 clients within 5 s were all answered %s after the\n"+
		"first, with %s retransmissions; the median took %s ms, the 99th percentile %s ms.\n",
		r.show(count, "storm/requests"), r.show(seconds, "storm/took"), r.show(count, "storm/retransmissions"),
		r.show(millis, "storm/p50"), r.show(millis, "storm/p99"))
}

func (r *results) lone(b *strings.Builder) {
	fmt.Fprintf(b, "A lone request on an idle router, socket to socket, takes %s ms to create, %s ms to renew and %s ms to\n"+
		"delete a mapping; the kernel's transaction takes %s ms of that and a datagram there and back %s ms.\n",
		r.show(millis, "lone/create/p50"), r.show(millis, "lone/renew/p50"), r.show(millis, "lone/delete/p50"),
		r.show(millis, "lone/transaction/p50"), r.show(millis, "lone/echo/p50"))
}
