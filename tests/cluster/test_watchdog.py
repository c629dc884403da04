"""The watchdog between hosts: it does not hear through MPI, and says so when a link is cut."""

OPTIONS = ("--hidden", "16,16", "--epochs", 10_000, "--global-batch-size", 32, "--log-every", 10)

# On login: cut host n2 off once steps are logged.
CUT = ('(until grep -q \'"step"\' "$0/metrics.jsonl" 2>/dev/null; do sleep 0.05; done; ip link set v2 down) & '
       'exec "$@"')


def said(done):
    return [line.partition("watchdog: ")[2] for line in done.stderr.splitlines() if "watchdog: " in line]


def test_a_cut_link_ends_in_the_watchdogs_sentence(run_hosts, clouds, tmp_path):
    run = tmp_path / "run"
    done = run_hosts("2,2", "bash", "-c", CUT, run, "{mpiexec}", "{python}", "-m", "hpcmlp", "train", "--data", clouds,
                     "--out", run, *OPTIONS, "--watchdog", 2)
    assert done.returncode != 0
    first = said(done)[0]
    assert "ranks 0, 1 have waited" in first or "rank 0 has waited" in first, done.stderr
    assert "late: rank 2 (host n2, " in first and "its host or the link to it is down" in first
    assert "rank 3 (host n2, " in first
    assert any("ends with 75" in text for text in said(done))
    assert (run / "stacks-n1.txt").exists()


def test_a_rank_that_stops_on_another_host_is_named_with_its_line(clouds, hpcmlp, tmp_path):
    done = hpcmlp("train", "--data", clouds, "--out", tmp_path / "run", *OPTIONS, "--watchdog", 2, ranks="2,2",
                  env={"HPCMLP_FAULT": "rank=3,step=40,act=stop"})
    first = said(done)[0]
    assert "late: rank 3 (host n2, " in first and "is stopped, in step 40, last sign of life" in first, done.stderr
    assert " at hpcmlp/" in first
    assert done.returncode == 75
    stacks = [(tmp_path / "run" / f"stacks-{host}.txt").read_text() for host in ("n1", "n2")]
    assert "rank 0 (host n1" in stacks[0] and "rank 2 (host n2" in stacks[1] and "Current thread" in stacks[1]


def test_a_rank_that_stops_alone_on_its_host_is_named_by_the_others(clouds, hpcmlp, tmp_path):
    done = hpcmlp("train", "--data", clouds, "--out", tmp_path / "run", *OPTIONS, "--watchdog", 2, ranks="1,1",
                  env={"HPCMLP_FAULT": "rank=0,step=40,act=stop"})
    first = said(done)[0]
    assert "late: rank 0 (host n1, " in first and "or it is stopped" in first, done.stderr
