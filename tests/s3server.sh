#!/usr/bin/env bash
# A real S3 server on loopback, for the tests (tests/fixtures_s3.py) and for trying things by hand.
#
#   s3server.sh start DIR [--kind ceph|moto] [--port N]   start (ceph: installs what is missing), print the environment
#   s3server.sh env   DIR                                 print the environment again (eval "$(... env DIR)")
#   s3server.sh stop  DIR                                 stop what `start` started; ceph's data stay in DIR
#   s3server.sh kill  DIR                                 the same with SIGKILL (to test durability)
#
#   ceph  Ceph from Debian's packages: one ceph-mon, one ceph-osd (BlueStore in a sparse file), radosgw. Durable.
#   moto  moto_server of the test extra, requests signed by one IAM user. In memory: the data are gone when it stops.
#
# Environment: S3_ACCESS_KEY, S3_SECRET_KEY (ceph; else random, kept in DIR), S3_SIZE_GIB (ceph, sparse, 20),
#   S3_VENV (the virtual environment with moto; default: the project's .venv).
# Everything is under DIR, everything listens on 127.0.0.1 only. Stops only the pids it recorded in DIR.
set -euo pipefail
die() { echo "s3server: $*" >&2; exit 1; }
usage() { sed -n '2,14p' "$0" >&2; exit 2; }
log() { echo "s3server: $*" >&2; }

HERE=$(cd "$(dirname "$0")" && pwd)
cmd=${1:-}; [[ $cmd =~ ^(start|stop|kill|env)$ ]] && [ -n "${2:-}" ] || usage
mkdir -p "$2"; D=$(cd "$2" && pwd); shift 2
KIND=""; PORT=""
while [ $# -gt 0 ]; do case $1 in
  --kind) KIND=$2; shift 2;; --port) PORT=$2; shift 2;; *) usage;; esac; done
ST=$D/.s3server; mkdir -p "$ST"; chmod 700 "$ST"

free_port() { python3 -c 'import socket;s=socket.socket();s.bind(("127.0.0.1",0));print(s.getsockname()[1])'; }
port_busy() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
rand() { python3 -c "import secrets;print(secrets.token_hex($1))"; }
# a recorded process is "pid starttime": never signal a pid that was given to another process since
start_time() { local s; s=$(cat "/proc/$1/stat" 2>/dev/null) || return 1; s=${s##*) }; set -- $s; [ "$1" != Z ] && echo "${20}"; }
record() { echo "$2 $(start_time "$2")" > "$ST/$1.proc"; }
alive() { local p t; [ -f "$ST/$1.proc" ] && read -r p t < "$ST/$1.proc" && [ -n "$t" ] && [ "$(start_time "$p")" = "$t" ]; }
pid_of() { cut -d' ' -f1 "$ST/$1.proc"; }
ORDER="gateway osd mon"    # the order to stop in

signal_all() { # SIGNAL SECONDS
  local n i
  for n in $ORDER; do
    if alive "$n"; then
      kill "-$1" "$(pid_of "$n")" 2>/dev/null || true
      for ((i = 0; i < $2 * 20; i++)); do alive "$n" || break; sleep 0.05; done
      if alive "$n"; then kill -KILL "$(pid_of "$n")" 2>/dev/null || true; sleep 0.2; fi
    fi
    rm -f "$ST/$n.proc"
  done
}

print_env() {
  [ -f "$ST/credentials" ] && [ -f "$ST/port" ] || die "nothing was started in $D"
  . "$ST/credentials"
  cat <<E
export AWS_ACCESS_KEY_ID=$ACCESS
export AWS_SECRET_ACCESS_KEY=$SECRET
export AWS_ENDPOINT_URL=http://127.0.0.1:$(cat "$ST/port")
export MLFLOW_S3_ENDPOINT_URL=http://127.0.0.1:$(cat "$ST/port")
export AWS_DEFAULT_REGION=us-east-1
export AWS_REGION=us-east-1
export AWS_EC2_METADATA_DISABLED=true
export AWS_REQUEST_CHECKSUM_CALCULATION=when_required
export AWS_RESPONSE_CHECKSUM_VALIDATION=when_required
E
}

wait_http() { # SECONDS NAME LOG
  local i
  for ((i = 0; i < $1 * 20; i++)); do
    alive "$2" || { tail -n 20 "$3" >&2; die "$2 ended while starting"; }
    python3 - "$(cat "$ST/port")" <<'P' && return 0
import http.client, sys
c = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=5)
try:
    c.request("GET", "/"); sys.exit(0 if c.getresponse().status < 500 else 1)
except OSError:
    sys.exit(1)
P
    sleep 0.05
  done
  die "no answer on port $(cat "$ST/port") after $1 s"
}

# ---------------------------------------------------------------- ceph
ceph_install() {
  local p missing=()
  for p in radosgw:radosgw radosgw:radosgw-admin ceph-mon:ceph-mon ceph-mon:monmaptool ceph-osd:ceph-osd ceph-common:ceph; do
    PATH=$PATH:/usr/sbin command -v "${p#*:}" >/dev/null || missing+=("${p%%:*}")
  done
  [ ${#missing[@]} = 0 ] && return
  log "installing radosgw ceph-mon ceph-osd"
  local sudo=""; [ "$(id -u)" = 0 ] || sudo=sudo
  $sudo apt-get update -qq >&2
  # in an image that runs systemd keep Debian's own units from starting
  $sudo env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends radosgw ceph-mon ceph-osd >&2
}

ceph_conf() {
  cat > "$D/ceph.conf" <<E
[global]
fsid = $(cat "$ST/fsid")
mon host = [v2:127.0.0.1:$(cat "$ST/monport")/0]
auth cluster required = none
auth service required = none
auth client required = none
# radosgw's own default is "secure" to the monitor, which cannot work without cephx
ms mon client mode = crc
ms bind msgr1 = false
ms bind ipv6 = false
keyring = /dev/null
run dir = $D/run
crash dir = $D/run
admin socket =
log file = $D/log/\$name.log
pid file = $D/run/\$name.pid
debug ms = 0
debug rgw = 0
debug rocksdb = 0
debug bluestore = 0
mon cluster log to file = false
client mount timeout = 30
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 1000
mon data avail warn = 1
mon data avail crit = 0
paxos propose interval = 0.01
paxos min wait = 0.01
[mon.a]
mon data = $D/mon
[osd]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
osd data = $D/osd
osd objectstore = bluestore
osd class update on start = false
osd fast shutdown = true
bluestore block size = $((${S3_SIZE_GIB:-20} << 30))
bdev aio poll ms = 20
bluestore fsck on mkfs = false
bluestore cache autotune = false
bluestore cache size = 134217728
[client]
rgw frontends = beast endpoint=127.0.0.1:$(cat "$ST/port") tcp_nodelay=1
rgw data = $D/run
rgw thread pool size = 64
rgw enable apis = s3, admin
rgw enable usage log = false
rgw run sync thread = false
rgw dynamic resharding = false
rgw override bucket index max shards = 1
E
}

ceph_daemon() { # NAME PROGRAM ARGS...
  local n=$1; shift
  "$@" -c "$D/ceph.conf" -f > "$D/log/$n.out" 2>&1 < /dev/null 9>&- &
  record "$n" $!; disown $!
}

ceph_start() {
  ceph_install
  export PATH=$PATH:/usr/sbin CEPH_ARGS=""
  local new=0 mm i uuid
  mkdir -p "$D"/{mon,osd,run,log}
  [ -f "$ST/made" ] || { new=1; rm -rf "${D:?}"/{mon,osd}; mkdir -p "$D"/{mon,osd}; cat /proc/sys/kernel/random/uuid > "$ST/fsid"; }
  mm=$ST/monmap
  if [ $new = 1 ] || { port_busy "$(cat "$ST/monport")" && ! alive mon; }; then
    free_port > "$ST/monport"
    monmaptool --create --clobber --fsid "$(cat "$ST/fsid")" --addv a "[v2:127.0.0.1:$(cat "$ST/monport")/0]" --enable-all-features "$mm" > "$D/log/monmaptool.out" 2>&1
    ceph_conf
    if [ $new = 1 ]; then ceph-mon --mkfs -i a -c "$D/ceph.conf" --monmap "$mm" > "$D/log/mkfs-mon.out" 2>&1 || { cat "$D/log/mkfs-mon.out" >&2; die "ceph-mon --mkfs"; }
    else ceph-mon -i a -c "$D/ceph.conf" --inject-monmap "$mm" > "$D/log/inject.out" 2>&1 || { cat "$D/log/inject.out" >&2; die "inject-monmap"; }; fi
  fi
  ceph_conf
  ceph() { timeout 30 /usr/bin/ceph -c "$D/ceph.conf" "$@"; }
  alive mon || ceph_daemon mon ceph-mon -i a
  if [ $new = 1 ]; then
    uuid=$(cat /proc/sys/kernel/random/uuid)
    ceph osd new "$uuid" > "$D/log/osd-new.out" 2>&1 || { cat "$D/log/osd-new.out" >&2; die "ceph osd new"; }
    ceph-osd -i 0 -c "$D/ceph.conf" --mkfs --osd-uuid "$uuid" > "$D/log/mkfs-osd.out" 2>&1 || { tail -n 20 "$D/log/mkfs-osd.out" >&2; die "ceph-osd --mkfs"; }
  fi
  local up_from=0; alive osd || { up_from=$(ceph osd dump -f json | osd_up_from); ceph_daemon osd ceph-osd -i 0; }
  # after a crash the monitor still believes the old osd up: wait for a new boot, not for "up"
  for ((i = 0; i < 600; i++)); do
    alive osd || { tail -n 20 "$D/log/osd.out" >&2; die "ceph-osd ended while starting"; }
    [ "$(ceph osd dump -f json | osd_up_from)" -gt "$up_from" ] && break; sleep 0.05
  done
  . "$ST/credentials"
  if [ $new = 1 ]; then
    timeout 60 radosgw-admin -c "$D/ceph.conf" user create --uid=ci --display-name=ci --access-key="$ACCESS" --secret-key="$SECRET" > "$D/log/user.out" 2>&1 || { tail -n 20 "$D/log/user.out" >&2; die "user create"; }
    touch "$ST/made"
  fi
  alive gateway || ceph_daemon gateway radosgw -n client.rgw.a
  wait_http 60 gateway "$D/log/gateway.out"
}
osd_up_from() { python3 -c 'import json,sys
o=json.load(sys.stdin)["osds"]; print(o[0]["up_from"] if o and o[0]["up"] else 0)'; }

# ---------------------------------------------------------------- moto
moto_start() {
  local here; here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
  local v=${S3_VENV:-$HERE/../.venv} i
  mkdir -p "$D/log"
  [ -x "$v/bin/moto_server" ] || die "no moto_server in $v: run make test once, or set S3_VENV"
  alive gateway && return
  rm -f "$ST/credentials"      # its user is made by the server, and lost with it
  # the first 3 requests are free: they make the user, its policy and its key
  INITIAL_NO_AUTH_ACTION_COUNT=3 MOTO_S3_DEFAULT_KEY_BUFFER_SIZE=1048576 TMPDIR=$D \
    "$v/bin/python" "$here/moto_server.py" -H 127.0.0.1 -p "$(cat "$ST/port")" > "$D/log/gateway.out" 2>&1 < /dev/null 9>&- &
  record gateway $!; disown $!
  for ((i = 0; i < 600; i++)); do
    alive gateway || { tail -n 20 "$D/log/gateway.out" >&2; die "moto_server ended"; }
    port_busy "$(cat "$ST/port")" && break; sleep 0.05
  done
  AWS_EC2_METADATA_DISABLED=true "$v/bin/python" - "$(cat "$ST/port")" > "$ST/credentials" <<'P'
import boto3, json, sys
iam = boto3.client("iam", endpoint_url=f"http://127.0.0.1:{sys.argv[1]}", region_name="us-east-1",
                   aws_access_key_id="x", aws_secret_access_key="x")
iam.create_user(UserName="ci")
iam.put_user_policy(UserName="ci", PolicyName="s3", PolicyDocument=json.dumps(
    {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}))
k = iam.create_access_key(UserName="ci")["AccessKey"]
print(f"ACCESS={k['AccessKeyId']}\nSECRET={k['SecretAccessKey']}")
P
}

# ----------------------------------------------------------------
exec 9> "$ST/lock"; flock 9
case $cmd in
env) print_env;;
stop) signal_all TERM 15;;
kill) signal_all KILL 5;;
start)
  [ -n "$KIND" ] || KIND=$(cat "$ST/kind" 2>/dev/null || echo ceph)
  [[ $KIND =~ ^(ceph|moto)$ ]] || usage
  [ ! -f "$ST/kind" ] || [ "$(cat "$ST/kind")" = "$KIND" ] || die "$D holds a $(cat "$ST/kind") server"
  echo "$KIND" > "$ST/kind"
  if ! alive gateway; then
    [ -n "$PORT" ] || PORT=$(cat "$ST/port" 2>/dev/null || free_port)
    if port_busy "$PORT"; then log "port $PORT is taken"; PORT=$(free_port); fi
    echo "$PORT" > "$ST/port"
    [ -f "$ST/credentials" ] || printf 'ACCESS=%s\nSECRET=%s\n' "${S3_ACCESS_KEY:-CI$(rand 9)}" "${S3_SECRET_KEY:-$(rand 20)}" > "$ST/credentials"
    trap 'rc=$?; [ $rc = 0 ] || signal_all TERM 5; exit $rc' EXIT
    "${KIND}_start"
  fi
  print_env;;
esac
