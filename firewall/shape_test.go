package firewall_test

import (
	"pcpd/firewall"
	"pcpd/pcp/pcpserver"
)

// What a server wants of a device.
var (
	_ pcpserver.Mapper        = (*firewall.Device)(nil)
	_ pcpserver.DynamicMapper = (*firewall.Device)(nil)
	_ pcpserver.Filterer      = (*firewall.Device)(nil)
	_ pcpserver.Idler         = (*firewall.Device)(nil)
	_ pcpserver.Restorer      = (*firewall.Device)(nil)
	_ pcpserver.Committer     = (*firewall.Device)(nil)
	_ pcpserver.Committer     = (*firewall.Table)(nil)
)
