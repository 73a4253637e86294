"""Sphinx renders what nbdev has processed: the notebooks with their stored outputs, and a signature for every exported name."""
project = 'rsstudy'
author = 'the rsstudy authors'
extensions = ['myst_nb']
html_theme = 'furo'
html_title = 'rsstudy'
nb_execution_mode = 'off' # results are committed, a site build runs nothing
myst_enable_extensions = ['dollarmath', 'colon_fence']
myst_heading_anchors = 3
suppress_warnings = ['mystnb.unknown_mime_type', 'myst.xref_missing', 'myst.header', 'misc.highlighting_failure']
exclude_patterns = ['_build', 'README.md']
