# Runs "$@" in a machine like a pod's: a network and mounts of its own, a root file system that cannot be written, and of the
# host's folders those that the chart mounts, made by root as kubelet makes them. Needs root; nothing is left behind.
#
#     unshare --mount --net --propagation private bash unprivileged.sh REPOSITORY COMMAND…
#
# What COMMAND runs as the chart's user begins with $AS_USER; $AS_CHOWN is root with CAP_CHOWN and nothing else.
set -euo pipefail
repository=$1
shift
ip link set lo up 2>/dev/null || true
for folder in /var/lib /run /opt; do mount -t tmpfs -o mode=755 pod "$folder"; done
mkdir -p /opt/src /run/shoal /var/lib/shoal/cachenode /var/lib/shoal/controller
chmod 777 /var/lib/shoal/controller # an emptyDir
# The repository may lie where only root may look.
mount --bind "$repository" /opt/src
mount --rbind / /mnt
mount -t tmpfs -o mode=1777 pod /mnt/tmp
for folder in /mnt /mnt/opt/src; do mount -o remount,bind,ro "$folder"; done
without="--no-new-privs --clear-groups --inh-caps=-all"
export AS_USER="setpriv $without --bounding-set=-all --reuid=65532 --regid=65532"
export AS_CHOWN="setpriv $without --bounding-set=-all,+chown"
export HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHON=/opt/src/.venv/bin/python
export PYTHONPATH=/opt/src/client:/opt/src/cachenode:/opt/src/controller
exec chroot /mnt "$@"
