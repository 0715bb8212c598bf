package main

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"pcpd/firewall"
	"pcpd/internal/control"
	"pcpd/pcp"
	"pcpd/pcp/pcpserver"
)

// obstacles asks the kernel for what is in the way of packets.
func obstacles(q firewall.Question) ([]firewall.Obstacle, error) { return firewall.Obstacles(0, q) }

func (m machine) port(name string) firewall.Interface {
	return firewall.Interface{Name: name, Index: m.interfaces(name).Index}
}

// examineFirewalls looks for other firewalls that would drop what mappings
// open: an accept in one table does not overrule a drop in another.
func (m machine) examineFirewalls(c *config, out *findings) {
	var seen []string
	for _, ipv4 := range []bool{true, false} {
		for _, name := range c.internal {
			if !c.servesFamily(ipv4) {
				continue
			}
			list, err := m.obstacles(firewall.Question{IPv4: ipv4, Translated: ipv4 && c.serves(pcpserver.TypeNAT444),
				Inside: m.port(name), Outside: m.port(c.external), Mark: c.mark, Host: c.hostFirewall})
			if err != nil {
				out.warn("it is unknown whether another firewall drops what mappings open: %v", err)
				return
			}
			for _, o := range list {
				// What does not hit every mapping is for the check of one.
				if text := c.obstacleText(&o); o.Doubt != firewall.Depends && !o.Tie && !slices.Contains(seen, text) {
					seen = append(seen, text)
					out.warn("%s", text)
				}
			}
		}
	}
}

// firewalls looks for foreign rules that are in the mapping's way.
func (p *patient) firewalls() {
	m := &p.Mapping
	lan := p.lan
	if lan == "" {
		lan = p.cfg.internal[0]
	}
	q := firewall.Question{IPv4: m.Internal.Addr().Is4(), Protocol: m.Protocol, Internal: m.Internal, External: m.External, Translated: p.translated(),
		Own: p.machine.own(m.External.Addr()), Filters: m.Filters, Inside: p.machine.port(lan), Outside: p.machine.port(p.cfg.external),
		Client: p.Client.Addr(), Mark: p.cfg.mark, Host: p.cfg.hostFirewall}
	if m.Kind == pcp.KindPeer {
		q.Remote, q.Filters = m.RemotePeer, nil
	}
	list, err := p.machine.obstacles(q)
	if err != nil {
		p.out.warn("it is unknown whether another firewall drops its packets: %v", err)
		return
	}
	for _, o := range list {
		level := control.LevelWarning
		if (o.Doubt == firewall.Sure || o.Rest) && !o.Tie && o.Effect != firewall.EffectSNAT && o.Packets != firewall.PacketsRequest {
			level = control.LevelProblem
		}
		p.out.add(level, "%s", []any{p.cfg.obstacleText(&o)})
	}
	if len(list) == 0 {
		p.out.ok("no rule of another firewall is in its way, as far as nftables has them: what iptables-legacy or a bridge drops is not seen")
	}
}

// obstacleText says what a chain does, and what to do.
func (c *config) obstacleText(o *firewall.Obstacle) string {
	does := fmt.Sprintf("the chain %s of the table %s %s, which is not pcpd's, %s", printable(o.Chain), o.Family, printable(o.Table),
		fmt.Sprintf(deeds[o.Effect], o.Packets))
	switch rule := ruleText(o); {
	case o.Doubt == firewall.Unread:
		return fmt.Sprintf("it cannot be told whether %s: %s in %s cannot be judged; if packets do not arrive, %s",
			does, cmp.Or(o.Puzzle, "something"), rule, remedy(o))
	case o.Rest:
		return fmt.Sprintf("%s, but for some of them: %s; %s", does, rule, remedy(o))
	case o.Doubt == firewall.Depends:
		return fmt.Sprintf("%s, depending on who sends and when: %s; if that is not meant, %s", does, rule, remedy(o))
	case o.Tie:
		return fmt.Sprintf("%s, unless pcpd's table was loaded last, since both have the same priority: %s; %s", does, rule, remedy(o))
	case o.Effect == firewall.EffectDrop && o.Hook == "forward" && !c.hostFirewall:
		return fmt.Sprintf("%s: %s; say --firewall host if that firewall is to stay, and %s", does, rule, remedy(o))
	default:
		return fmt.Sprintf("%s: %s; %s", does, rule, remedy(o))
	}
}

// deeds are what an obstacle does to packets.
var deeds = map[firewall.Effect]string{
	firewall.EffectDrop:    "drops %s",
	firewall.EffectDNAT:    "sends elsewhere %s, before pcpd can translate it",
	firewall.EffectSNAT:    "gives another source than the mapping's external address and port to %s",
	firewall.EffectUntrack: "keeps from connection tracking, and so from translation, %s",
}

// ruleText names the rule that decides, so that it can be found in what
// `nft -a list ruleset` prints.
func ruleText(o *firewall.Obstacle) string {
	if o.Handle == 0 {
		return "its policy is drop, and no rule accepts them all"
	}
	where := ""
	if o.RuleChain != o.Chain {
		where = " of the chain " + printable(o.RuleChain)
	}
	return fmt.Sprintf("rule handle %d%s `%s`", o.Handle, where, printable(o.Rule))
}

func remedy(o *firewall.Obstacle) string {
	if o.Fix == "" {
		return "let them pass with a rule in that chain before all others"
	}
	return "let them pass with: " + o.Fix
}

// printable is a name or a rule that another program has chosen in a form that
// a terminal survives.
func printable(s string) string {
	if strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return strconv.Quote(s)
	}
	return s
}
