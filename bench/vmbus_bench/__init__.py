"""The benchmark: `scripts/bench`. Every figure stands beside a baseline that was measured in the same run.

figures         samples, targets, the report: no I/O
processes       server processes to measure, CPU time of other processes
host            host-only transactions: the real server and library, the guest's side in this process
answering       a provider that does nothing, for the part `host`
doorbell        one doorbell, stage by stage
save_restore    a server with packets in flight, saved and restored
guest           the same driver in a Linux guest, against virtio-serial
audit           transactions with audit records, against the same without
downtime        live migration with the device, against the same VM without it
scsi            a disk behind Linux's hv_storvsc, against QEMU's virtio-blk
network         the network card of a Linux guest, Linux's hv_netvsc, against virtio-net
debian          a boot of Debian from our disk, against one from virtio-blk
"""
