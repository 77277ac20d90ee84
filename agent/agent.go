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
// # The boot loader
//
// systemd-boot is on the ESP twice: at EFI/BOOT, where firmware finds it without any
// variable, and at EFI/systemd, where bootctl keeps it. In every good boot [LoaderKeeper]
// compares the two, and puts back the one that the firmware would refuse, or that is not
// the one that started, from the other: a copy that is missing, cut short, altered or
// somebody else's. An update replaces one after the other (package partition).
//
// [BootEntries] sees to boot entries of the firmware's: for the second copy, right behind
// the entry that the disk was booted by, so that a first copy that is refused is followed
// by the second at once, and before the network; and behind that for the kernel images of
// the releases that are good, the one that runs first. An entry that is there, wherever, is
// left: the order is its owner's, but for the releases' in front of the boot loader, which
// would then count no boots. No variable is written in a boot that finds them all; a commit
// changes those of the releases, whose files have new names. They go behind and not to the
// front, so that a board's own order, a stick before the disk for one, stays, and that the
// boot of a good box is the one it was; boards that lose their variables lose no more than
// the second chance. One that does not keep them gets them twice
// (loader/holdfast-bootentry.json on the ESP remembers, until the board is another one),
// and one whose store is full or read-only is used without; status says why. Where a board
// insists on starting a release before the boot loader, its entry is switched off; a
// release that waits for its first boot is worth three restarts that do not come to it.
//
// A kernel image that the firmware refuses makes the boot loader come back, and the second
// one chooses it again. Then the firmware starts a good release by its own entry. The
// initrd of that sees in LoaderEntrySelected what was refused, leaves it no tries, whether
// it was on trial or good, and restarts, once; the release then started says what was wrong
// ([Updater.Refused]). Where both copies of the boot loader are refused, a release runs
// without, and an installation brings new ones.
//
// The attempt that failed is in the event log: EDK2 measures its return and the next call
// into PCR 4, and nothing of it into PCR 7. Policies that bind PCR 4, strict and all
// without Secure Boot, do not open in that boot: the initrd puts the copy back before it
// asks for anything, and restarts once, into a boot that has the registers that were
// sealed to ([Machine.Mend]). So it does, once until a boot is good, after anything else
// that came back before. Where it cannot, and somebody types the recovery key,
// [Keeper.Settle] seals to the boot with both copies, too. A board that stops at a message
// about the refusal needs a person at its keyboard all the same.
//
// A boot without any boot loader asks for that key too, once. The next one is predicted as
// it would be by the loader that is noted of the release, which keeps the usual state, or
// by the one that comes with a release to be installed, and without what the firmware tried
// before: all of it, unless the values sealed to show that some is tried at each boot. If
// another program stands between the firmware and the kernel image, there is no telling; an
// installation is refused then, and says that holdfast apply makes it at the bench.
//
// # The firmware's keys
//
// A release whose spec says secureboot.enroll: force brings the vendor's PK, KEK and db in
// its initrd. [Enrolment] writes them to a firmware in setup mode, on a box whose data are
// not sealed yet or that had these keys before, and has it restart: what a firmware does
// not keep is never sealed to (F4). Two attempts are made; what became of them lies in
// loader/holdfast-enrolment.json on the ESP, and in the status. A box on which they fail
// is used without Secure Boot, as one whose firmware cannot do it. Enrolling replaces
// what PK, KEK and db hold; certificates of others stay if they are among the vendor's
// files (package keys).
//
// A release may bring changes of db and dbx. [SecureBootKeeper] makes one a boot, once
// the release is good and no other one waits: it seals the data volumes for the next
// boot with the new keys too, writes the variable, and has the box restart in the
// update window; the boot that finds the new keys drops the old state. What would keep
// the boot loader, the running release or the one in the other slot from starting is
// not written: such a change waits, and status says for what. A dbx that revokes the
// release in the other slot is therefore made after the next update has taken its place.
//
// # After a hand-off
//
// Of updates, the image's own init then does what the agent would, by five commands;
// examples/debian has the units for systemd. `holdfast-agent update status` works at
// any time, and one command waits for, or refuses to run beside, another.
//
//   - Nothing follows the repository and no medium is looked at. A timer runs
//     `holdfast-agent update apply`, which ends with 0 when a release is installed, and
//     then reboots when it likes; 3 is nothing new. For a bundle or a repository on a
//     medium, mount it read-only and give the path.
//   - In every boot that is healthy, and has been for a while (ten seconds here), run
//     `holdfast-agent bless`. Nothing else makes a release the one that is kept. It
//     has to follow the services that matter and their health: for systemd a unit with
//     Requires= and After= on them that asks them once more and then blesses. Not only
//     after an update: when both slots are good, the boots of a good one are counted
//     until it is blessed again (F74), and five without take it for one that broke.
//   - When that fails (OnFailure=), and by a timer for what hangs, run
//     `holdfast-agent reject REASON`. It ends with 0 on trial: reboot then, as
//     [RunSystem] does. The next try may go better; after the third the old release is
//     back, and has the reason in its status and journal. It ends with 3 when the
//     release was good before, which is kept: do nothing (systemd: ExecCondition=).
//   - Where releases change the firmware's keys (spec section secureboot), run
//     `holdfast-agent keys` after bless. It ends with 0 when it has made a change, and
//     then reboot when you like; 3 is none.
//   - A kernel that panics reboots by itself. For an init that hangs, have it feed the
//     watchdog (systemd: RuntimeWatchdogSec=).
//
// # Sealing
//
// A volume's header has a TPM token for each state of the box in which it is to open:
// each slot that may boot, in the present values of the registers that the spec's policy
// binds and, where somebody asked for it, in those after a change of the firmware's
// keys. [Keeper] decides which, from the boot entries and the firmware's event log;
// [Sealer] has the headers follow, under the management key that lies on the open
// volumes. [Updater] has a release's first boot sealed for before that release is
// written, and refuses one whose first boot cannot be predicted. What is over is dropped in
// the next good boot ([Keeper.Settle]), which also seals to the present state after a
// boot that took the recovery key. `holdfast-agent reseal` does what wants a person:
// values after a change of the firmware's keys, and suspension before its update.
//
// A PIN is the release's wish (seal.pin) or the box owner's ([Keeper.SetPIN]); it lies on
// the open volumes, because states are sealed anew without asking anybody. A box whose
// policy is rollback-proof goes back to a release of a lower epoch by a file of the
// vendor's on its ESP ([image.AuthorisationPath]), and says so in status.
//
// After a hand-off `holdfast-agent bless` settles too, and sees to the boot loader.
//
// # Integrity
//
// A volume of a spec with `integrity: hmac-sha256` has dm-integrity below dm-crypt, as
// cryptsetup luksFormat --integrity hmac-sha256 makes it: each sector of 4096 bytes has
// a tag, over its number and its ciphertext, that only the volume key makes. A sector
// that was changed or moved on the disk, or has decayed, reads as an error (EILSEQ, of
// which ext4 makes EIO), and the agent says in status which volume and which sector;
// without integrity it reads as other bytes. It does not notice an older content of the
// same sector that was put back together with its tag: what an attacker kept of the
// disk fits for ever, sector by sector.
//
// It costs a write of the whole volume at the first boot, up to a fiftieth of the room
// for tags and journal, and a second write of everything, by the journal, which keeps
// data and tag together over a power cut. Where the processor is the limit it halves the
// speed: in an emulated machine 3.8 MB/s written and 2.9 read, and without 8.0 and 5.9. Such a volume keeps its size: on a disk that became
// larger it is not grown, and status says so. A release that asks for integrity where a
// volume was made without, or the other way, changes nothing but what status says.
// After a hand-off nothing watches for errors; the kernel's log has them.
//
// # Encrypted slots
//
// Where the spec asks for it (disk.encrypt_slots), the slots are encrypted with a key of
// the box's own, below dm-verity; see package slotcrypt. The key is made with the volumes
// and lies on them, so that whatever opens them opens the slots, the recovery key too,
// and nothing more is sealed. The order of a boot is another one then: the volumes come
// first, then the slot, then the root. A slot that is in the clear, as the builder and
// the bench leave it, is encrypted in place by its first boot; the agent writes a release
// encrypted if that release asks for it. A slot whose release does not is left in the
// clear: that release could not open it.
//
// [Eraser.Reset] carries the key over, encrypted under the secret that the TPM gave in
// this boot, on the ESP, until the next boot has made new volumes. It refuses where the
// TPM has not opened the volumes since the box has encrypted slots. The boot that takes
// the key overwrites that, and so does [Eraser.Decommission], which leaves slots that
// nobody opens any more. Both ends of the data prove what they did; see package
// seal/attest/erasure.
//
// # What is not protected
//
// Slots are in the clear unless the spec says otherwise, and the kernel image on the ESP
// (kernel, initrd, this agent) always is. What flash kept of a slot from before it was
// encrypted is not reached.
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
