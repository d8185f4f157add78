"""``shoal prefetch``: bring a dataset into the cache before the job, and say the truth about how that went.

The job is the controller's and the nodes'; this command starts it and watches. So a watcher that is killed, or a
controller that restarts, does not end the job.

The rule: exit status 0 means that every byte was in the cache, verified, when the job ended.
"""

from __future__ import annotations

import time

import click
import tenacity

from shoal import datasets, sizes
from shoal.cli import connect, output, records, watching
from shoal.errors import ClusterUnavailable, ShoalError, Unavailable

#: Replaced in tests.
sleep = time.sleep

EXAMPLES = """\b
Examples:
  shoal prefetch flights
  shoal prefetch flights/2013/ --no-wait
  shoal prefetch flights@3f9a
  shoal prefetch --list
  shoal prefetch --watch JOB_ID
  shoal prefetch --cancel JOB_ID
"""


@click.command(epilog=EXAMPLES)
@click.argument("target", required=False, metavar="[NAME[@SNAPSHOT][/PREFIX]]")
@click.option("--no-wait", is_flag=True, help="Start the job and return.")
@click.option("--list", "list_jobs", is_flag=True, help="List jobs instead.")
@click.option("--watch", "watched", metavar="JOB_ID", help="Watch a job that runs already instead.")
@click.option("--cancel", "cancelled", metavar="JOB_ID", help="Cancel a job instead.")
@connect.endpoint_option
@output.json_option
def prefetch(
    target: str | None,
    no_wait: bool,
    list_jobs: bool,
    watched: str | None,
    cancelled: str | None,
    endpoint: str | None,
    as_json: bool,
) -> None:
    """Fetch a dataset, or what of it begins with PREFIX, into the cache.

    Refused at once where it does not fit. Ctrl-C ends the watching, not the job.
    """
    if sum(1 for given in (target, list_jobs, watched, cancelled) if given) != 1:
        raise click.UsageError("give either NAME[@SNAPSHOT][/PREFIX] or one of --list, --watch and --cancel")
    if no_wait and not target:
        raise click.UsageError("--no-wait goes with NAME only")
    if list_jobs:
        _list(endpoint, as_json)
    elif cancelled:
        _cancel(endpoint, cancelled, as_json)
    elif watched:
        _finish(follow(endpoint, watched), as_json)
    elif target:
        job = _start(endpoint, target)
        if no_wait and job["state"] not in ("failed", "refused", "cancelled"):
            output.document(job) if as_json else output.data(
                f"started prefetch {job['id']} of {target}: 'shoal prefetch --watch {job['id']}' shows how it goes"
            )
        else:
            _finish(job if job["state"] in records.FINISHED else follow(endpoint, job["id"]), as_json)


def _start(endpoint: str | None, target: str) -> records.Json:
    wanted = datasets.parse_path(target.removeprefix("shoal://"))
    with connect.control(connect.cluster(endpoint)) as control:
        return records.job(control.start_prefetch(wanted.root, wanted.path))


def _list(endpoint: str | None, as_json: bool) -> None:
    with connect.control(connect.cluster(endpoint)) as control:
        jobs = [records.job(raw) for raw in control.prefetches()]
    if as_json:
        output.document(jobs)
    elif jobs:
        output.data(output.table(records.JOB_COLUMNS, map(records.job_row, jobs)))
    else:
        output.remark("there are no prefetch jobs: 'shoal prefetch NAME' starts one")


def _cancel(endpoint: str | None, job_id: str, as_json: bool) -> None:
    with connect.control(connect.cluster(endpoint)) as control:
        job = records.job(control.cancel_prefetch(job_id))
    if as_json:
        output.document(job)
    elif job["state"] == "cancelled":
        output.data(f"cancelled prefetch {job_id} of {records.job_target(job)}: {_progress(job)} stay cached")
    else:
        output.data(f"prefetch {job_id} of {records.job_target(job)} had ended already: {job['state']}")


def follow(endpoint: str | None, job_id: str) -> records.Json:
    """Watch a job until it is finished, with a bar on stderr, over restarts of the controller.

    Raises:
        Unavailable: the controller stayed away for `watching.SILENCE_TIMEOUT_S`.
        NotFound: there is no such job.
        click.exceptions.Exit: Ctrl-C.
    """
    goes_on = (
        f"the prefetch goes on: 'shoal prefetch --watch {job_id}' shows it, 'shoal prefetch --cancel {job_id}' ends it"
    )
    with watching.Bar(goes_on) as bar:
        return _watch(endpoint, job_id, bar)


def _watch(endpoint: str | None, job_id: str, bar: watching.Bar) -> records.Json:
    heard_at = time.monotonic()

    def once() -> records.Json:
        # The endpoint is asked each time: a controller may come back elsewhere.
        nonlocal heard_at
        while True:
            with connect.control(connect.cluster(endpoint)) as control:
                state = ""
                for raw in control.watch_prefetch(job_id):
                    heard_at = time.monotonic()
                    job = records.job(raw)
                    state = job["state"]
                    bar.show(records.job_target(job), job["bytes_done"], job["bytes_total"], job["reason"])
                    if state in records.FINISHED:
                        return job
            if not state:
                raise ClusterUnavailable(f"the controller says nothing of prefetch {job_id}: see its log")

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(Unavailable),
        wait=tenacity.wait_exponential(multiplier=0.1, max=5.0),
        stop=lambda _: time.monotonic() - heard_at > watching.SILENCE_TIMEOUT_S,
        sleep=lambda seconds: sleep(seconds),
        reraise=True,
    )(once)


def _finish(job: records.Json, as_json: bool) -> None:
    if as_json:
        output.document(job)
    target, state = records.job_target(job), job["state"]
    if state != "done":
        how = "was cancelled" if state == "cancelled" else "was refused" if state == "refused" else "failed"
        reason = f": {job['reason']}" if job["reason"] else ""
        raise ShoalError(f"prefetch {job['id']} of {target} {how} after {_progress(job)}{reason}")
    if not as_json:
        output.data(f"prefetched {target}: {sizes.format(job['bytes_done'])} are cached and verified")


def _progress(job: records.Json) -> str:
    return f"{sizes.format(job['bytes_done'])} of {sizes.format(job['bytes_total'])}"
