# The world of one engine: in its namespaces the mounts, network devices and files of /run are the
# engine's own. $1 is the engine's directory; $2 a Debian tree as the root directory, or empty;
# $3 the directory of the programs under test.
set -e
mount -t tmpfs -o mode=0755 engine-run /run
ip link set lo up

# A sysfs shows the devices of the network namespace in which it was mounted.
mkdir "$1/sys"
mount --rbind /sys "$1/sys"
mount -t sysfs sysfs /sys
for part in fs/cgroup fs/bpf kernel/security kernel/debug kernel/tracing; do
    if mountpoint -q "$1/sys/$part"; then
        mount --bind "$1/sys/$part" "/sys/$part"
    fi
done
umount -l "$1/sys"
rmdir "$1/sys"

if [ -n "$2" ]; then
    mkdir "$1/tree" "$1/upper" "$1/work"
    mount -t overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" engine-tree "$1/tree"
    for part in proc sys dev run; do
        mount --rbind "/$part" "$1/tree/$part"
    done
    for dir in "$1" "$3" /etc/isopod /usr/lib/cni; do
        if [ -d "$dir" ]; then
            mkdir -p "$1/tree/$dir"
            mount --bind "$dir" "$1/tree/$dir"
        fi
    done
    cd "$1/tree"
    mkdir -p old-root
    pivot_root . old-root
    umount -l old-root
    rmdir old-root
fi
echo ready
exec sleep infinity
