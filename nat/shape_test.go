package nat_test

import (
	"pcpd/firewall"
	"pcpd/internal/ct"
	"pcpd/nat"
	"pcpd/pcp/pcpserver"
)

// What a server wants of a device.
var (
	_ pcpserver.Mapper        = (*nat.Device)(nil)
	_ pcpserver.DynamicMapper = (*nat.Device)(nil)
	_ pcpserver.Filterer      = (*nat.Device)(nil)
	_ pcpserver.Idler         = (*nat.Device)(nil)
	_ pcpserver.Restorer      = (*nat.Device)(nil)
	_ pcpserver.Committer     = (*nat.Device)(nil)
)

var (
	_ firewall.Extension = (*nat.Device)(nil)
	_ firewall.Flows     = (*ct.Conn)(nil)
	_ nat.Flows          = (*ct.Conn)(nil)
)
