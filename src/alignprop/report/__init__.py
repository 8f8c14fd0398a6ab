"""What came of a run: its summary in words, and `report.html`."""

from alignprop.report.page import MAX_STRIP, write_report
from alignprop.report.pages import data_uri, page_template, require_pages, versions
from alignprop.report.records import Record
from alignprop.report.summary import MAX_FALL, Change, Summary, summarise
from alignprop.report.wording import duration, lower_bound, memory, number, signed

__all__ = [
    "MAX_FALL",
    "MAX_STRIP",
    "Change",
    "Record",
    "Summary",
    "data_uri",
    "duration",
    "lower_bound",
    "memory",
    "number",
    "page_template",
    "require_pages",
    "signed",
    "summarise",
    "versions",
    "write_report",
]
