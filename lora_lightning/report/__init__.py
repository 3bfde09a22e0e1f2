"""Creates tables, images and files from confusion matrices."""

from lora_lightning.report.confusion import SHOWN_CLASSES, Confusion, Report
from lora_lightning.report.figure import confusion_figures, report_figures
from lora_lightning.report.files import free_name, free_path, refuse_to_overwrite, write_report, write_to
from lora_lightning.report.page import page_of, write_page
from lora_lightning.report.table import report_table
from lora_lightning.report.terminal import show

__all__ = [
    "SHOWN_CLASSES",
    "Confusion",
    "Report",
    "confusion_figures",
    "free_name",
    "free_path",
    "page_of",
    "refuse_to_overwrite",
    "report_figures",
    "report_table",
    "show",
    "write_page",
    "write_report",
    "write_to",
]
