"""What a process listens on, on its own; as a program: two ranks of an evaluation's kind, each saves its sockets.

    torchrun --standalone --nproc-per-node 2 -m support.listening FOLDER
"""
import ipaddress
import json
import os
import sys
from pathlib import Path

import torch

LISTEN = '0A'


def address(text):
    """'0100007F:1F90' of /proc/net/tcp: words in the machine's order."""
    host, port = text.split(':')
    words = [bytes.fromhex(host[i:i + 8])[::-1] for i in range(0, len(host), 8)]
    return str(ipaddress.ip_address(b''.join(words))), int(port, 16)


def listening(pid='self'):
    """Addresses and ports of TCP on which a process waits for connections."""
    inodes = set()
    for link in Path(f'/proc/{pid}/fd').iterdir():
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith('socket:'):
            inodes.add(target[len('socket:['):-1])
    found = []
    for name in ('tcp', 'tcp6'):
        table = Path(f'/proc/{pid}/net/{name}')
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            fields = line.split()
            if fields[3] == LISTEN and fields[9] in inodes:
                found.append(address(fields[1]))
    return sorted(found)


def is_loopback(host):
    ip = ipaddress.ip_address(host)
    return (getattr(ip, 'ipv4_mapped', None) or ip).is_loopback


def main(folder):
    from timm_sam.cli.device import set_up
    from timm_sam.cli.processes import leave_process_group
    from timm_sam.evaluation.ranks import Ranks
    before = listening()
    process = set_up('cpu')
    ranks = Ranks()
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    found = dict(before=before, during=listening(), seen=ranks.gather(process.rank), total=total.item(),
                 launcher=listening(os.getppid()), interface=os.environ.get('GLOO_SOCKET_IFNAME'))
    Path(folder, f'{process.rank}.json').write_text(json.dumps(found))
    process.gather(None)
    ranks.close()
    leave_process_group()


if __name__ == '__main__':
    main(sys.argv[1])
