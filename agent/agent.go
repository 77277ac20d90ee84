// Package agent is the device at run time, and the only package with effects
// on the kernel. The same program runs twice in a boot.
//
// In the initrd ([RunInitrd]) it loads the modules the build chose, finds the
// root by the hash in its measured description, maps it with dm-verity, opens
// the data volumes with one TPM unseal, and closes the TPM's door behind itself
// by measuring "leave-initrd" into PCR 11: from then on no key can be had in
// this boot, whoever takes the box over.
//
// On the root ([RunSystem]) it is PID 1: it reaps, brings up the network, runs
// the onboot containers in order, keeps the services, answers on a unix socket
// ([Client]), and on the way down stops everything and closes the volumes. An
// image with an init of its own gets the machine instead (hand-off); then only
// the initrd's part is done and its findings lie in /run/holdfast.
//
// # First boot
//
// A data partition starts with a marker. [Machine.OpenVolumes] makes all
// volumes behind their markers, shows the recovery key, and publishes each by
// one sector; a power cut before that starts over, a cut after loses nothing.
//
// # Updates
//
// [Updater] checks a source (the spec's repository, a path, a medium that is plugged
// in), writes the slot that does not run, and leaves a boot entry with three tries. A
// release on trial is blessed once every service has been up for ten seconds; one
// whose services keep dying, whose data stay closed, or that panics, uses its tries up,
// and the old one is back. [Updater.Settle] then says why, in status and in the
// journal, and that release is not taken again by itself. A slot that was good has its
// boots counted too, up to its services, when the other slot is good (F74).
//
// After a hand-off nothing follows the repository: call `holdfast-agent update` from a
// timer of the image's own, and `holdfast-agent bless` in every boot that is healthy.
//
// # What is not protected
//
// A medium's file system is parsed by the kernel: spec `stick: false` keeps it out.
// Without a data volume nothing is remembered from boot to boot, and a release that
// failed is taken again. Whoever can run code as root in the running appliance reads the data, as the
// services do. The console shows the recovery key once, at the first boot: who
// watches the console then knows it. A service's container confines mistakes;
// it shares the kernel, and there is no seccomp filter. Removing the power does
// not clear memory at once. Rolling the disk back to an older state of itself
// is not noticed. Who had the box long enough to start a system of his own on
// it can put volumes of his in the place of all of ours: they open, with nothing
// of ours in them, and PCR 15 tells a verifier. Who can write to the disk can
// mark it as new, and the box makes empty volumes and shows him their key.
package agent
