#!/usr/bin/env bash
# A real Slurm on this machine's loopback, from Debian packages: munge, slurmctld and several slurmd.
#
#   sudo tests/cluster/slurm.sh start [DIR]    # then: export SLURM_CONF=DIR/slurm.conf
#   sudo tests/cluster/slurm.sh stop [DIR]     # ends what start began, and removes DIR
# Exit code 3: the packages are not to be had, or the daemons do not run here.
#
# 2 nodes (sn1, sn2) of 4 pretended CPUs and 2 pretended GPUs; partitions main, low (preemptible by
# high) and high. Writes below DIR, one marked line to /etc/hosts, and the packages; without
# systemd, so that it works in a container. It takes 20 seconds the first time, then 3.
set -Eeuo pipefail

DO=${1:-}
DIR=${2:-/var/tmp/kalmagrove-slurm}
NODES=2 CPUS=4 MEMORY=16000 GPUS=2 PORT=${KALMAGROVE_SLURM_PORT:-26810}
MARK="# kalmagrove $DIR"
say() { echo "slurm.sh: $*" >&2; }
die() { say "$*"; exit 1; }
unable() { say "$*"; exit 3; } # there is no Slurm to be had on this machine
trap 'die "line $LINENO: $BASH_COMMAND failed; see $DIR/log"' ERR

[ "$(id -u)" = 0 ] || die "needs root, as slurmd starts jobs as their owners"

alive() { [ "$(cat "/proc/$(cat "$DIR/run/$1.pid" 2>/dev/null)/comm" 2>/dev/null)" = "${1%%.*}" ]; }
until_true() { # SECONDS COMMAND...
  local end=$((SECONDS + $1)); shift
  until "$@" >/dev/null 2>&1; do [ $SECONDS -lt $end ] || return 1; sleep 0.1; done
}

install() {
  local need=() p
  for p in munge:munged slurmctld:slurmctld slurmd:slurmd slurm-client:sbatch; do
    command -v "${p#*:}" >/dev/null || need+=("${p%%:*}")
  done
  [ ${#need[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || unable "${need[*]} are missing, and this is not Debian"
  say "installing ${need[*]}"
  local policy=/usr/sbin/policy-rc.d made=0
  if [ ! -e $policy ]; then printf '#!/bin/sh\nexit 101\n' >$policy; chmod 755 $policy; made=1; fi
  local apt=(apt-get -y --no-install-recommends -o DPkg::Lock::Timeout=60) failed=0
  export DEBIAN_FRONTEND=noninteractive
  "${apt[@]}" install "${need[@]}" >"$DIR/log/apt.log" 2>&1 ||
    { apt-get update >>"$DIR/log/apt.log" 2>&1 &&
      "${apt[@]}" install "${need[@]}" >>"$DIR/log/apt.log" 2>&1; } || failed=1
  [ $made = 0 ] || rm -f $policy # it only kept apt from starting daemons
  [ $failed = 0 ] || { tail -n 5 "$DIR/log/apt.log" >&2; unable "apt-get cannot install ${need[*]}"; }
}

configure() {
  local host line i
  host=$(hostname -s)
  line="127.0.0.1$(printf " sn%d" $(seq $NODES)) $MARK"
  getent hosts "$host" >/dev/null || line="127.0.0.1 $host ${line#* }"
  # In place, as containers mount this file.
  grep -qxF "$line" /etc/hosts || { cp /etc/hosts "$DIR/hosts"; echo "$line" >>"$DIR/hosts"; cat "$DIR/hosts" >/etc/hosts; }
  for i in $(seq 0 $((GPUS - 1))); do
    [ -c "$DIR/dev/gpu$i" ] || mknod -m 666 "$DIR/dev/gpu$i" c 1 3 # as /dev/null
  done
  for i in $(seq $NODES); do echo "NodeName=sn$i Name=gpu Type=fake File=$DIR/dev/gpu[0-$((GPUS - 1))]"; done >"$DIR/gres.conf"
  printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' >"$DIR/cgroup.conf"
  # With its own address for the host's name, srun and slurmstepd must listen on all of them.
  local listen=NoInAddrAny,NoCtldInAddrAny
  [ "$(getent ahostsv4 "$host" | awk 'NR==1{print $1}')" = 127.0.0.1 ] || listen=NoAddrCache
  cat >"$DIR/slurm.conf" <<CONF
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it starts again (Slurm's default: 120)
AuthInfo=socket=$DIR/munge/socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=$listen
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/run/spool.%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd.%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=5
MinJobAge=3600
AccountingStorageType=accounting_storage/none
CONF
  for i in $(seq $NODES); do
    echo "NodeName=sn$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((PORT + i)) CPUs=$CPUS RealMemory=$MEMORY Gres=gpu:fake:$GPUS"
  done >>"$DIR/slurm.conf"
  cat >>"$DIR/slurm.conf" <<CONF
PartitionName=main Nodes=ALL Default=YES DefaultTime=10 PriorityTier=1 PreemptMode=OFF
PartitionName=low Nodes=ALL DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL DefaultTime=10 PriorityTier=10 PreemptMode=OFF
CONF
}

start() {
  mkdir -p "$DIR"/{log,run,munge,dev,state}
  chmod 755 "$DIR" "$DIR"/{log,run,munge,dev}
  install
  configure
  export SLURM_CONF=$DIR/slurm.conf
  if ! alive munged; then
    rm -f "$DIR"/munge/socket*
    [ -s "$DIR/munge/key" ] || (umask 077; head -c 1024 /dev/urandom >"$DIR/munge/key")
    munged --num-threads=2 --key-file="$DIR/munge/key" --socket="$DIR/munge/socket" \
      --pid-file="$DIR/run/munged.pid" --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge/seed"
  fi
  alive slurmctld || slurmctld
  until_true 30 scontrol ping || unable "slurmctld does not answer; see $DIR/log/slurmctld.log"
  for i in $(seq $NODES); do
    mkdir -p "$DIR/run/spool.sn$i"
    alive "slurmd.sn$i" || slurmd -N "sn$i"
  done
  until_true 40 bash -c "! sinfo -h -N -o %T | grep -vqE '^(idle|mixed|allocated|completing)$'" ||
    { sinfo -N -l >&2; unable "the nodes do not come up; see $DIR/log"; }
  [ "$(timeout 60 srun -N$NODES -n$NODES -t 1 hostname | wc -l)" = $NODES ] || unable "a test job fails"
  say "$NODES nodes are up: export SLURM_CONF=$SLURM_CONF"
}

end_one() { # NAME: by its recorded process id, and only if /proc says that it is this program
  local pid
  alive "$1" || return 0
  pid=$(cat "$DIR/run/$1.pid")
  kill "$pid"
  until_true 20 bash -c "! kill -0 $pid" || kill -9 "$pid"
}

stop() {
  [ -d "$DIR/run" ] || return 0
  export SLURM_CONF=$DIR/slurm.conf
  # Jobs first: they outlive slurmd.
  if alive slurmctld; then
    scancel --partition=main; scancel --partition=low; scancel --partition=high
    until_true 20 bash -c '[ -z "$(squeue -h)" ]' || say "jobs are left: $(squeue -h -o %A | xargs)"
  fi
  for i in $(seq $NODES); do end_one "slurmd.sn$i"; done
  end_one slurmctld
  end_one munged
  { grep -vF "$MARK" /etc/hosts || true; } >"$DIR/hosts"
  cat "$DIR/hosts" >/etc/hosts
  rm -rf -- "$DIR"
}

case $DIR in /*/*) ;; *) die "$DIR must be an absolute path, and of two parts at least" ;; esac
case $DO in start | stop) $DO ;; *) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2 ;; esac
