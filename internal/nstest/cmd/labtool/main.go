// Command labtool makes the traffic of the lab and the demo: a server that
// says where its callers seem to come from, and the caller.
//
//	labtool serve ADDR:PORT                    UDP and TCP, until it is killed
//	labtool ask udp|tcp ADDR:PORT [FROM:PORT]  prints the answer; status 1 if there is none
package main

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"
)

const patience = 2 * time.Second

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "labtool:", err)
		os.Exit(1)
	}
}

func run(args []string, out io.Writer) error {
	switch {
	case len(args) == 2 && args[0] == "serve":
		return serve(args[1], out)
	case (len(args) == 3 || len(args) == 4) && args[0] == "ask":
		from := ""
		if len(args) == 4 {
			from = args[3]
		}
		answer, err := ask(args[1], args[2], from)
		if err == nil {
			fmt.Fprintln(out, answer)
		}
		return err
	}
	return fmt.Errorf("usage: labtool serve ADDR:PORT | labtool ask udp|tcp ADDR:PORT [FROM:PORT]")
}

func serve(addr string, out io.Writer) error {
	packets, err := net.ListenPacket("udp", addr)
	if err != nil {
		return err
	}
	defer packets.Close()
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	defer listener.Close()
	fmt.Fprintf(out, "serving on %s\n", addr)

	failed := make(chan error, 2)
	go func() { failed <- serveUDP(packets) }()
	go func() { failed <- serveTCP(listener) }()
	return <-failed
}

func answer(to net.Addr) []byte {
	return fmt.Appendf(nil, "hello from the inside, you come from %v\n", to)
}

func serveUDP(conn net.PacketConn) error {
	buf := make([]byte, 2048)
	for {
		_, from, err := conn.ReadFrom(buf)
		if err != nil {
			return err
		}
		_, _ = conn.WriteTo(answer(from), from) // a caller that is gone is no reason to stop
	}
}

func serveTCP(ln net.Listener) error {
	for {
		conn, err := ln.Accept()
		if err != nil {
			return err
		}
		_, _ = conn.Write(answer(conn.RemoteAddr()))
		conn.Close()
	}
}

func ask(network, to, from string) (string, error) {
	dialer := net.Dialer{Timeout: patience}
	var err error
	switch {
	case network != "udp" && network != "tcp":
		return "", fmt.Errorf("protocol %q is neither udp nor tcp", network)
	case from != "" && network == "udp":
		dialer.LocalAddr, err = net.ResolveUDPAddr(network, from)
	case from != "":
		dialer.LocalAddr, err = net.ResolveTCPAddr(network, from)
	}
	if err != nil {
		return "", err
	}
	conn, err := dialer.Dial(network, to)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return "", err
	}
	if network == "udp" {
		if _, err := io.WriteString(conn, "hello?\n"); err != nil {
			return "", err
		}
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	return strings.TrimSpace(line), err
}
