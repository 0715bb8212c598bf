package netns_test

import (
	"testing"
	"time"

	"pcpd/internal/nstest"
	"pcpd/pcp"
)

// PEER makes an outbound mapping, or learns and lengthens the one that is
// there (RFC 6887, Section 12).
func TestNAT444Peer(t *testing.T) {
	t.Parallel()
	lab := nstest.NewLab(t)
	d := startDaemon(t, lab)
	c := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)

	for _, protocol := range []string{"udp", "tcp"} {
		number := protocolNumber(protocol)
		remote := serve(t, lab.Outside, protocol, nstest.OutsideAddr, 0).String()
		t.Run(protocol+" B-41a the flow leaves from the suggested port", func(t *testing.T) {
			r := peerRequest(number, 5000, remote)
			r.SuggestedExternal = suggest(r, hostport(nstest.RouterWAN, 15000)).SuggestedExternal
			answer := c.grant(r)
			if answer.External != r.SuggestedExternal || answer.RemotePeer != r.RemotePeer {
				t.Fatalf("assigned %v to %v, want %v to %v", answer.External, answer.RemotePeer, r.SuggestedExternal, r.RemotePeer)
			}
			if seen := reached(t, lab.Inside, protocol, hostport(nstest.InsideAddr, 5000), remote); seen != answer.External {
				t.Errorf("the peer saw %v, want %v", seen, answer.External)
			}
		})
		t.Run(protocol+" B-41b another's port is not given", func(t *testing.T) {
			c2 := newClient(t, lab.Inside2, nstest.Inside2Addr, nstest.RouterLAN)
			r := suggest(peerRequest(number, 5001, remote), hostport(nstest.RouterWAN, 15000))
			c2.refuse(pcp.ResultCannotProvideExternal, r)
		})
		t.Run(protocol+" the peer may speak first, a stranger may not", func(t *testing.T) {
			external := c.grant(peerRequest(number, 5002, hostport(nstest.OutsideAddr, 9002))).External
			serve(t, lab.Inside, protocol, nstest.InsideAddr, 5002)
			notReached(t, lab.Outside2, protocol, hostport(nstest.Outside2Addr, 9002), external.String())
			reached(t, lab.Outside, protocol, hostport(nstest.OutsideAddr, 9002), external.String())
		})
	}
	remote := serve(t, lab.Outside, "udp", nstest.OutsideAddr, 0).String()
	t.Run("B-41c an implicit flow is reported as it is", func(t *testing.T) {
		seen := sameSocket(t, lab.Inside.For(t).ListenUDP(hostport(nstest.InsideAddr, 5003)), remote)
		if answer := c.grant(peerRequest(pcp.ProtocolUDP, 5003, remote)); answer.External != seen {
			t.Errorf("reported as %v, seen as %v", answer.External, seen)
		}
	})
	t.Run("B-47 after MAP, PEER has MAP's external port", func(t *testing.T) {
		mapped := c.mapped("udp", 5004)
		if answer := c.grant(peerRequest(pcp.ProtocolUDP, 5004, remote)); answer.External != mapped {
			t.Errorf("PEER got %v, MAP %v", answer.External, mapped)
		}
	})
	t.Run("the mapping outlives the kernel's memory of the flow", func(t *testing.T) {
		conn := lab.Inside.For(t).ListenUDP(hostport(nstest.InsideAddr, 5005))
		assigned := c.grant(peerRequest(pcp.ProtocolUDP, 5005, remote)).External
		first := sameSocket(t, conn, remote)
		lab.Router.Run("conntrack", "-D", "-p", "udp", "--orig-src", nstest.InsideAddr, "--sport", "5005")
		if second := sameSocket(t, conn, remote); first != assigned || second != assigned {
			t.Errorf("seen as %v, then %v; assigned %v", first, second, assigned)
		}
	})
	t.Run("B-42 PEER cannot shorten", func(t *testing.T) {
		c.grant(peerRequest(pcp.ProtocolUDP, 5006, remote))
		answer := c.grant(lasting(peerRequest(pcp.ProtocolUDP, 5006, remote), 0))
		if answer.Lifetime < 59*time.Minute {
			t.Errorf("lifetime %v after a request for 0, want what is left of the hour", answer.Lifetime)
		}
	})
	t.Run("B-41d another nonce is refused", func(t *testing.T) {
		thief := newClient(t, lab.Inside, nstest.InsideAddr, nstest.RouterLAN)
		thief.refuse(pcp.ResultNotAuthorized, peerRequest(pcp.ProtocolUDP, 5006, remote))
	})
	t.Run("the list names the remote peer", func(t *testing.T) {
		for _, m := range d.mappings() {
			if m.Kind == "peer" && m.Internal.Port() == 5006 && m.Remote != nil && m.Remote.String() == remote {
				return
			}
		}
		t.Errorf("no such mapping in %+v", d.mappings())
	})
}
