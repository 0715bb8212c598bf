package main

import (
	"errors"
	"fmt"
	"net"
)

// notify tells the service manager about the daemon (sd_notify(3)). socket is
// the value of NOTIFY_SOCKET; "" means that nobody wants to know.
func notify(socket, state string) error {
	if socket == "" {
		return nil
	}
	if socket[0] == '@' {
		socket = "\x00" + socket[1:] // an abstract name
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("tell the service manager: %w", err)
	}
	_, err = conn.Write([]byte(state))
	return errors.Join(err, conn.Close())
}
