"""Names of what a report consists of, in the folder that a run writes."""

PAGE_NAME = "report.html"
FIGURE_FOLDER = "report"
PICTURE_NAME = "calibration-image.png"
