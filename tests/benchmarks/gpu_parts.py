"""Parts of a GPU measurement that end in the ways that real ones may."""

import time


def measures(report):
    report.add("first", {"value": 1.5})
    report.attempt("second", lambda: 1 / 0)
    report.attempt("third", lambda: {"value": 2})
    report.attempt("fourth", lambda: {"value": 3}, seconds=1e6)
    report.attempt("fifth", lambda: report.need_cuda("this"))


def sleeps(report):
    report.add("before", {"value": 1})
    time.sleep(600)


def raises(report):
    raise RuntimeError("the device fell off the bus")
