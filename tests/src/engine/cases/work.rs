//! Real programs, in a Debian tree. Podman lays an overlay over the tree: importing it as an image
//! would take minutes in a lab.

use std::fmt::Write as _;
use std::fs;

use crate::command::Command;
use crate::engine::{Container, Run, tree};

/// Clients that set, get and count for a minute. Then the count is right, and each of 300
/// values is there.
const LOAD: &str = "\
set -e
end=$(($(date +%s) + 60))
rounds=0
while [ $(date +%s) -lt $end ]; do
    redis-benchmark -h redis -q -c 20 -n 300 -t ping,set,get,incr,lpush,mset >/tmp/round
    redis-cli -h redis incr rounds >/dev/null
    rounds=$((rounds + 1))
done
[ $(redis-cli -h redis get rounds) = $rounds ]
[ $(redis-cli -h redis get counter:__rand_int__) = $((rounds * 300)) ]
redis-cli -h redis flushall
seq 300 | while read -r n; do echo \"SET key:$n value-of-$n\"; done | redis-cli -h redis --pipe
seq 300 | while read -r n; do echo \"GET key:$n\"; done | redis-cli -h redis >/tmp/values
seq -f value-of-%.0f 300 | cmp - /tmp/values
echo all there
";

/// 300 requests over connections that are kept; the checksum of each answer is compared.
const FETCH: &str = "\
import hashlib, http.client
sums = dict(line.split()[::-1] for line in open('/client/sums'))
names = sorted(sums)
web = http.client.HTTPConnection('web', 80, timeout=200)
good = 0
for number in range(300):
    name = names[number % len(names)]
    web.request('GET', '/' + name)
    answer = web.getresponse()
    body = answer.read()
    assert answer.status == 200, (name, answer.status)
    assert hashlib.sha256(body).hexdigest() == sums[name], (name, len(body))
    good += 1
print(good, 'answers as they should be')
";

/// Processes that share work, a queue, a lock and memory.
const PROCESSES: &str = "\
import multiprocessing as mp, os, sys
def square(n): return n * n, os.getpid()
def count(value, times):
    for _ in range(times):
        with value.get_lock(): value.value += 1
if __name__ == '__main__':
    with mp.Pool(4) as pool:
        answers = pool.map(square, range(2000), chunksize=20)
    assert [n for n, _ in answers] == [n * n for n in range(2000)]
    assert os.getpid() not in {pid for _, pid in answers}
    value = mp.Value('l', 0)
    workers = [mp.Process(target=count, args=(value, 500)) for _ in range(4)]
    for worker in workers: worker.start()
    for worker in workers: worker.join()
    assert value.value == 2000, value.value
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, b'x' * 70000); os._exit(7)
    os.close(write)
    assert len(open(read, 'rb').read()) == 70000
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
    print('processes agree')
";

/// The daemon that runs containers for Docker's. As in any container, cgroups that a daemon makes
/// need a root cgroup without processes (cgroup v2).
const CONTAINERD: &str = "\
set -e
cd /sys/fs/cgroup
mkdir init
for process in $(cat cgroup.procs); do echo $process >init/cgroup.procs 2>/dev/null || true; done
sed 's/^/+/; s/ / +/g' cgroup.controllers >cgroup.subtree_control
exec containerd >/var/log/containerd 2>&1
";

/// Starts Docker's daemon with its files in `$0`, and asks how it keeps images.
const DOCKERD: &str = "\
set -e
await() {
    end=$(($(date +%s) + 100))
    until [ -S $1 ]; do
        [ $(date +%s) -lt $end ] || { tail /var/log/$2 >&2; exit 1; }
        sleep 0.2
    done
}
await /run/containerd/containerd.sock containerd
rm -f /run/docker.sock
dockerd --containerd /run/containerd/containerd.sock --data-root $0 >/var/log/dockerd 2>&1 &
await /run/docker.sock dockerd
docker info --format '{{.Driver}}, cgroup v{{.CgroupVersion}}'
";

/// A build by Docker, and a container of the image on its network. Then the daemon ends.
const BUILD: &str = "\
set -e
cd /context
cat >Dockerfile <<'EOF'
FROM scratch
COPY busybox /bin/busybox
RUN [\"/bin/busybox\", \"sh\", \"-c\", \"echo built >/made\"]
CMD [\"/bin/busybox\", \"sh\", \"-c\", \"cd /bin; ./busybox cat /made; ./busybox ping -q -c 1 172.17.0.1 >/dev/null\"]
EOF
DOCKER_BUILDKIT=0 docker build --quiet --tag made . >/dev/null
docker run --rm made
kill $(cat /run/docker.pid)
while [ -e /run/docker.pid ]; do sleep 0.2; done
";

fn directory(run: &Run<'_>, name: &str) -> String {
    let path = run.engine.dir().join(run.name(name));
    fs::create_dir(&path).expect("a directory");
    path.to_string_lossy().into_owned()
}

/// `run` of a program in the tree. Its changes are lost with the container.
fn program<'e>(run: &Run<'e>, options: &[&str], command: &[&str]) -> Command<'e> {
    let tree = format!("{}:O", tree("ISOPOD_TEST_WORKLOAD_TREE"));
    run.command_of(&tree, "run", &[options, &["--rootfs"]].concat(), command)
}

fn serve<'r, 'e>(
    run: &'r Run<'e>,
    name: &str,
    options: &[&str],
    command: &[&str],
) -> Container<'r, 'e> {
    let container = run.named();
    let given = ["--detach", "--name", &container.name, "--network-alias", name];
    run.end(program(run, &[&given, options].concat(), command)).ok();
    container
}

/// Redis serves a client in another container for a minute.
pub fn redis_under_load(run: &Run<'_>) {
    let network = run.name("net");
    run.ok(&["network", "create", &network]);
    let on = format!("--network={network}");
    let words = ["redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", ""];
    let server = serve(run, "redis", &[&on], &words);
    server.await_log("Ready to accept connections");
    let client = program(run, &["--rm", &on], &["sh", "-c", LOAD]);
    let output = run.end(client).ok();
    assert!(output.stdout.ends_with("all there\n"), "{output}");
    server.remove();
    run.ok(&["network", "rm", &network]);
}

/// nginx serves files of a bind mount, whole and unchanged.
pub fn nginx_serves_files(run: &Run<'_>) {
    let site = directory(run, "site");
    let client = directory(run, "client");
    for number in 0..20_usize {
        // From a few bytes to more than fifty thousand, each file with another size.
        let line = format!("line of file {number}\n");
        fs::write(format!("{site}/{number}"), line.repeat(1 + number * number * 10))
            .expect("a file");
    }
    let sums = run.end(run.engine.inside(&["sh", "-c", "cd \"$0\" && sha256sum *", &site])).ok();
    fs::write(format!("{client}/sums"), sums.stdout).expect("checksums");
    fs::write(format!("{client}/fetch.py"), FETCH).expect("a script");
    let network = run.name("net");
    run.ok(&["network", "create", &network]);
    let on = format!("--network={network}");
    let site = format!("--volume={site}:/var/www/html:ro");
    let server = serve(run, "web", &[&on, &site], &["nginx", "-g", "daemon off;"]);
    let client = format!("--volume={client}:/client:ro");
    // nginx listens a while after its start, and reports nothing then.
    let script = "until : </dev/tcp/web/80; do sleep 0.2; done; exec python3 /client/fetch.py";
    let fetched = program(run, &["--rm", &on, &client], &["bash", "-c", script]);
    assert_eq!(run.end(fetched).ok().stdout, "300 answers as they should be\n");
    server.remove();
    run.ok(&["network", "rm", &network]);
}

/// Python's processes, which need semaphores, shared memory, pipes and signals.
pub fn python_processes(run: &Run<'_>) {
    let dir = directory(run, "python");
    fs::write(format!("{dir}/processes.py"), PROCESSES).expect("a script");
    let options = ["--rm", &format!("--volume={dir}:/work:ro") as &str];
    let command = program(run, &options, &["python3", "/work/processes.py"]);
    assert_eq!(run.end(command).ok().stdout, "processes agree\n");
}

/// `make -j2` builds a program in a volume. The program works, and a second call has nothing to do.
pub fn parallel_build(run: &Run<'_>) {
    const PARTS: usize = 8;
    let dir = directory(run, "source");
    let mut main = String::from("#include <stdio.h>\n");
    let mut calls = String::new();
    for part in 0..PARTS {
        let source = format!("#include <math.h>\nint part{part}(int n) {{ return n + {part}; }}\n");
        fs::write(format!("{dir}/part{part}.c"), source).expect("a source file");
        let _ = writeln!(main, "int part{part}(int);");
        let _ = write!(calls, " n = part{part}(n);");
    }
    let _ =
        writeln!(main, "int main(void) {{ int n = 0;{calls} printf(\"%d\\n\", n); return 0; }}");
    fs::write(format!("{dir}/main.c"), main).expect("a source file");
    let makefile = "objects := $(patsubst %.c,%.o,$(wildcard *.c))\nprogram: $(objects)\n\
                    \tgcc -o $@ $^\n%.o: %.c\n\tgcc -O2 -Wall -Werror -c -o $@ $<\n";
    fs::write(format!("{dir}/Makefile"), makefile).expect("a makefile");
    let volume = run.name("volume");
    run.ok(&["volume", "create", &volume]);
    let options = [
        "--rm",
        &format!("--volume={dir}:/source:ro") as &str,
        &format!("--volume={volume}:/build"),
        "--workdir=/build",
    ];
    let script = "cp /source/* . && make -j2 && ./program && make -q && echo up to date";
    let built = run.end(program(run, &options, &["sh", "-c", script])).ok();
    let sum: usize = (0..PARTS).sum();
    assert!(built.stdout.ends_with(&format!("\n{sum}\nup to date\n")), "{built}");
    run.ok(&["volume", "rm", &volume]);
}

/// Docker in a container, without rights on the host. Its images and containers are on a tmpfs,
/// then on a volume. For the volume overlayfs needs a file system of the host with user attributes.
pub fn docker_in_a_container(run: &Run<'_>) {
    let dir = directory(run, "docker");
    let mount = "modprobe loop || true; truncate -s 400M $0.image && mkfs.ext4 -q $0.image && \
                 mount -o loop $0.image $0";
    run.end(run.engine.inside(&["sh", "-c", mount, &dir])).ok();
    let container = run.named();
    let options = [
        "--detach",
        "--name",
        &container.name,
        "--privileged",
        "--memory=1g",
        "--tmpfs=/tmpfs:size=400m,mode=755",
        &format!("--volume={dir}:/volume"),
        "--volume=/bin/busybox:/context/busybox:ro",
    ];
    run.end(program(run, &options, &["sh", "-c", CONTAINERD])).ok();
    for root in ["/tmpfs", "/volume"] {
        let output = container.exec(&[], &["sh", "-c", DOCKERD, root]).ok();
        assert_eq!(output.stdout, "overlay2, cgroup v2\n", "{root}: {output}");
        let output = container.exec(&[], &["sh", "-c", BUILD]).ok();
        assert_eq!(output.stdout, "built\n", "{root}: {output}");
    }
    container.remove();
    run.end(run.engine.inside(&["sh", "-c", "umount $0 && rm $0.image", &dir])).ok();
}
