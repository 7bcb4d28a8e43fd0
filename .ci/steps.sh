# Runs a step of .ci/run and records its result, or a series of steps beside others. Sourced; $work is the run's folder.

results=$work/results.txt # a line a step: passed, failed or skipped; seconds; name; reason
tracks=()                  # processes that run a series of steps beside the others
: >"$results"

record() { # result, seconds, name, reason
  printf '%s\t%d\t%s\t%s\n' "$1" "$2" "$3" "${4:-}" >>"$results"
}

step() { # name, command...: its exit status decides
  local name=$1 started=$SECONDS result=failed
  shift
  printf '\n==== %s\n' "$name"
  "$@" && result=passed
  printf '==== %s: %s, %d s\n' "$name" "$result" $((SECONDS - started))
  record "$result" $((SECONDS - started)) "$name"
}

skip() { # name, reason
  printf '\n==== %s: skipped, %s\n' "$1" "$2"
  record skipped 0 "$1" "$2"
}

need() { # package, command...: the command, installed as a Debian package where this may be done
  local package=$1
  shift
  command -v "$1" >/dev/null && return
  [ "$(id -u)" = 0 ] && [ "${CI:-}" = true ] && command -v apt-get >/dev/null || return
  { apt-get install -y -qq "$package" || { apt-get update -qq && apt-get install -y -qq "$package"; }; } \
    >"$work/apt.log" 2>&1
  command -v "$1" >/dev/null
}

# A track is a function that runs steps, beside the steps that follow and behind them in priority. What it prints comes
# out when the tracks are joined. Tracks must not install anything: pip and apt-get have one user at a time.
beside() { # function
  printf '\n==== %s: beside what follows\n' "$1"
  set -m # a process group of its own, to be stopped whole
  { renice -n 10 -p "$BASHPID" >/dev/null; "$1"; } >"$work/$1.log" 2>&1 &
  set +m
  tracks+=("$!:$1")
}

join_tracks() {
  local track
  for track in "${tracks[@]}"; do
    wait "${track%%:*}" || record failed 0 "${track#*:}" "ended with status $?"
    cat "$work/${track#*:}.log"
  done
  tracks=()
}

stop_tracks() {
  local track
  for track in "${tracks[@]}"; do kill -- "-${track%%:*}"; done 2>/dev/null
}
