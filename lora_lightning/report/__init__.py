"""Creates tables, images and files from the results of an evaluation."""

from lora_lightning.report.figure import confusion_figures
from lora_lightning.report.page import write_page
from lora_lightning.report.table import report_table

__all__ = [
    "confusion_figures",
    "report_table",
    "write_page",
]
