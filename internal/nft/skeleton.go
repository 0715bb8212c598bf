package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// The data types of set keys and values.
var (
	TypeIPAddr      = nftables.TypeIPAddr
	TypeIP6Addr     = nftables.TypeIP6Addr
	TypeInetProto   = nftables.TypeInetProto
	TypeInetService = nftables.TypeInetService
	TypeIFName      = nftables.TypeIFName
	TypeMark        = nftables.TypeMark
)

// Set describes a set, or a map if Data is not empty.
type Set struct {
	Name string
	// Key and Data are the parts of the concatenation, in order.
	Key, Data []nftables.SetDatatype
	// HasTimeout lets elements have timeouts; Timeout is their default, if
	// not zero.
	HasTimeout bool
	Timeout    time.Duration
	// Dynamic lets rules add elements. Such a set needs a Size.
	Dynamic  bool
	Interval bool
	// DataRange makes the value of a map a range: Data twice, first and last.
	DataRange bool
	Size      uint32
	// GCInterval is how often the kernel looks for expired elements; zero is
	// the kernel's every second.
	GCInterval time.Duration
}

// Chain describes a chain; one without a Type is reached by jumps only.
type Chain struct {
	Name     string
	Type     nftables.ChainType // "filter", "nat" or "route"
	Hook     *nftables.ChainHook
	Priority int32
}

// Skeleton collects tables, chains and sets as google/nftables encodes them
// and adds them to a Batch.
type Skeleton struct {
	table *nftables.Table
	conn  *nftables.Conn
	sets  map[uint32]Set // by the identity that google/nftables gave
	msgs  []netlink.Message
	err   error
}

// errCaptured stops google/nftables before it would wait for answers.
var errCaptured = errors.New("captured")

// addSet guards google/nftables' package-wide counter of set identities.
var addSet sync.Mutex

// NewSkeleton starts a description of what is in the table.
func NewSkeleton(table string) *Skeleton {
	s := &Skeleton{table: &nftables.Table{Name: table, Family: nftables.TableFamilyINet}, sets: map[uint32]Set{}}
	// The socket of this connection is the function: it keeps what would be
	// sent, so that all of it can go into one transaction with messages
	// that google/nftables cannot make.
	s.conn, s.err = nftables.New(nftables.WithTestDial(func(req []netlink.Message) ([]netlink.Message, error) {
		s.msgs = append(s.msgs, req...)
		return nil, errCaptured
	}))
	return s
}

// AddChain adds a chain.
func (s *Skeleton) AddChain(c Chain) {
	if s.err != nil {
		return
	}
	chain := &nftables.Chain{Name: c.Name, Table: s.table}
	if c.Type != "" {
		accept := nftables.ChainPolicyAccept
		priority := nftables.ChainPriority(c.Priority)
		chain.Type, chain.Hooknum, chain.Priority, chain.Policy = c.Type, c.Hook, &priority, &accept
	}
	s.conn.AddChain(chain)
}

// AddSet adds a set or map, empty.
func (s *Skeleton) AddSet(d Set) {
	if s.err != nil {
		return
	}
	key, err := concat(d.Key)
	if err != nil {
		s.err = fmt.Errorf("key of set %s: %w", d.Name, err)
		return
	}
	set := &nftables.Set{Table: s.table, Name: d.Name, KeyType: key, Concatenation: len(d.Key) > 1,
		HasTimeout: d.HasTimeout, Timeout: d.Timeout, Dynamic: d.Dynamic, Interval: d.Interval,
		Size: d.Size, KeyByteOrder: binaryutil.BigEndian}
	if d.Key[0].Name == TypeIFName.Name || d.Key[0].Name == TypeMark.Name {
		set.KeyByteOrder = binaryutil.NativeEndian // how nft prints these
	}
	if len(d.Data) > 0 {
		set.IsMap = true
		if set.DataType, err = concat(d.Data); err != nil {
			s.err = fmt.Errorf("value of map %s: %w", d.Name, err)
			return
		}
		if d.DataRange {
			set.DataType.Bytes *= 2
		}
	}
	addSet.Lock()
	err = s.conn.AddSet(set, nil)
	addSet.Unlock()
	if err != nil {
		s.err = fmt.Errorf("set %s: %w", d.Name, err)
		return
	}
	s.sets[set.ID] = d
}

func concat(types []nftables.SetDatatype) (nftables.SetDatatype, error) {
	if len(types) == 1 {
		return types[0], nil
	}
	return nftables.ConcatSetType(types...)
}

// AppendTo adds the messages to a batch, chains and sets in the order in which
// they were added.
func (s *Skeleton) AppendTo(b *Batch) error {
	if err := s.capture(); err != nil {
		return err
	}
	for _, m := range s.msgs {
		typ := uint16(m.Header.Type)
		if typ == unix.NFNL_MSG_BATCH_BEGIN || typ == unix.NFNL_MSG_BATCH_END {
			continue
		}
		body := m.Data
		if typ == unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWSET {
			body = s.amend(body)
		}
		flags := uint16(m.Header.Flags) &^ (unix.NLM_F_ACK | unix.NLM_F_REQUEST)
		b.raw(typ&0xff, flags, body)
	}
	s.msgs = nil
	return nil
}

// capture moves what has been added to msgs.
func (s *Skeleton) capture() error {
	if s.err != nil {
		return s.err
	}
	if err := s.conn.Flush(); err != nil && !errors.Is(err, errCaptured) {
		return err
	}
	return nil
}

// The attribute of a set's userdata that says its values are ranges
// (libnftnl's NFTNL_UDATA_SET_DATA_INTERVAL).
const userdataDataInterval = 6

// amend adds to a NEWSET message what google/nftables v0.3.0 has no field for.
func (s *Skeleton) amend(body []byte) []byte {
	var d Set
	out := append([]byte(nil), body[:nfHeader]...)
	_ = attrs(body[nfHeader:], func(typ uint16, data []byte) error {
		if typ == unix.NFTA_SET_ID && len(data) == 4 {
			d = s.sets[binary.BigEndian.Uint32(data)]
		}
		return nil
	})
	_ = attrs(body[nfHeader:], func(typ uint16, data []byte) error {
		switch {
		case typ == unix.NFTA_SET_USERDATA && d.DataRange:
			data = userdata.AppendUint32(data, userdataDataInterval, 1)
		case typ == unix.NFTA_SET_DESC:
			typ |= unix.NLA_F_NESTED
		}
		out = appendAttr(out, typ, data)
		return nil
	})
	if d.GCInterval > 0 {
		out = appendU32(out, unix.NFTA_SET_GC_INTERVAL, uint32(d.GCInterval.Milliseconds()))
	}
	return out
}
