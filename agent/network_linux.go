package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"github.com/vishvananda/netlink"

	"github.com/holdfast-os/holdfast/image"
)

// resolvPath is where the name servers are written; the root's
// /etc/resolv.conf is a link to it.
const resolvPath = "/run/holdfast/resolv.conf"

// linkTime is how long a network device may take to appear and to get a link.
const linkTime = 30 * time.Second

// loopbackUp brings up lo; services talk over it even without a network.
func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find loopback: %w", err)
	}
	return netlink.LinkSetUp(lo)
}

// configure brings one interface up as the spec says, and keeps its lease.
// A box without a cable must still work, so failures are logged and retried.
func configure(ctx context.Context, log *slog.Logger, c image.Interface) {
	log = log.With("interface", c.Name)
	for ctx.Err() == nil {
		hold, err := configureOnce(ctx, log, c)
		if err == nil && hold == 0 {
			return
		}
		if err != nil {
			log.Warn("network", "error", err)
			hold = 15 * time.Second
		}
		select {
		case <-time.After(hold):
		case <-ctx.Done():
		}
	}
}

// configureOnce returns when to do it again: half the lease time, or never (0).
func configureOnce(ctx context.Context, log *slog.Logger, c image.Interface) (time.Duration, error) {
	link, err := findLink(ctx, c.Name)
	if err != nil {
		return 0, err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return 0, fmt.Errorf("bring up: %w", err)
	}
	if c.DHCP {
		return lease(ctx, log, link)
	}
	for _, cidr := range c.Addresses {
		addr, err := netlink.ParseAddr(cidr)
		if err != nil {
			return 0, err
		}
		if err := netlink.AddrReplace(link, addr); err != nil {
			return 0, fmt.Errorf("add address %s: %w", cidr, err)
		}
	}
	if c.Gateway != "" {
		if err := defaultRoute(link, net.ParseIP(c.Gateway)); err != nil {
			return 0, err
		}
	}
	if err := writeResolv(c.DNS); err != nil {
		return 0, err
	}
	log.Info("network", "addresses", strings.Join(c.Addresses, ","))
	return 0, nil
}

// findLink waits for the named device; "*" is the first that is not loopback.
func findLink(ctx context.Context, name string) (netlink.Link, error) {
	deadline := time.Now().Add(linkTime)
	for {
		links, err := netlink.LinkList()
		if err != nil {
			return nil, err
		}
		for _, l := range links {
			a := l.Attrs()
			if a.Name == name || name == "*" && a.Flags&net.FlagLoopback == 0 {
				return l, nil
			}
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("no network device %q after %v: is its driver in kernel.modules?", name, linkTime)
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func lease(ctx context.Context, log *slog.Logger, link netlink.Link) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, linkTime)
	defer cancel()
	client, err := nclient4.New(link.Attrs().Name)
	if err != nil {
		return 0, fmt.Errorf("open DHCP socket: %w", err)
	}
	defer client.Close()
	got, err := client.Request(ctx)
	if err != nil {
		return 0, fmt.Errorf("ask for a DHCP lease: %w", err)
	}
	ack := got.ACK
	mask := ack.SubnetMask()
	if mask == nil {
		mask = ack.YourIPAddr.DefaultMask()
	}
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: ack.YourIPAddr, Mask: mask}}
	if err := netlink.AddrReplace(link, addr); err != nil {
		return 0, fmt.Errorf("add address %v: %w", addr, err)
	}
	if routers := ack.Router(); len(routers) > 0 {
		if err := defaultRoute(link, routers[0]); err != nil {
			return 0, err
		}
	}
	if err := writeResolv(addresses(ack)); err != nil {
		return 0, err
	}
	log.Info("network", "address", addr.IPNet.String(), "by", "dhcp")
	return max(ack.IPAddressLeaseTime(time.Hour)/2, 30*time.Second), nil
}

func addresses(ack *dhcpv4.DHCPv4) (dns []string) {
	for _, ip := range ack.DNS() {
		dns = append(dns, ip.String())
	}
	return dns
}

func defaultRoute(link netlink.Link, gateway net.IP) error {
	if gateway == nil {
		return errors.New("gateway is not an IP address")
	}
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: gateway}
	if err := netlink.RouteReplace(route); err != nil {
		return fmt.Errorf("set default route by %v: %w", gateway, err)
	}
	return nil
}

// writeResolv replaces the name servers; none keeps what is there.
func writeResolv(servers []string) error {
	if len(servers) == 0 {
		return nil
	}
	var b strings.Builder
	for _, s := range servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	// Containers bind this very file, so it is rewritten in place.
	return os.WriteFile(resolvPath, []byte(b.String()), 0o644)
}
