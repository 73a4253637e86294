"""Sphinx renders what docs/build.py has written. Nothing is run, and no page asks another host for anything."""

from collections import Counter

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.addnodes import pending_xref
from sphinx.transforms.post_transforms import SphinxPostTransform

project, author, html_title = "rsstudy", "the rsstudy authors", "rsstudy"
copyright = "the rsstudy authors, Apache-2.0"
extensions = ["myst_nb"]
exclude_patterns = ["*.txt"]

html_theme = "furo"
html_static_path = ["static"]
html_css_files, html_js_files = ["rsstudy.css"], ["search.js"]
html_favicon = "static/favicon.svg"
html_copy_source = html_show_sourcelink = (
    False  # the pages are written from notebooks: their Markdown is nobody's source
)
html_domain_indices = False  # the package's own page lists the modules

nb_execution_mode = "off"  # results are committed, a site build runs nothing
nb_render_markdown_format = "myst"  # tables and figures among the outputs
nb_ipywidgets_js = {}
myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

add_module_names = False
python_maximum_signature_line_length = 60  # a parameter a line, which a telephone can show
toc_object_entries = False  # a third of the build's time; each module's page starts with its names instead
nitpicky = True  # a name that leads nowhere is an error; types of other libraries lead nowhere by nature
nitpick_ignore_regex = [("py:class", ".*")]

html_math_renderer = "mathml"  # browsers draw it themselves: no script and no fonts to ship or to ask for


def inline_math(page, node):
    page.body.append(convert(node.astext()))
    raise SkipNode


def block_math(page, node):
    page.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise SkipNode


class TypesOfOneMeaning(SphinxPostTransform):
    """The type `Item` in a signature is linked wherever it is defined.

    Where two modules have one, it is linked only to that of the same module.
    """

    default_priority = 5  # before links are resolved

    def run(self):
        meanings = Counter(name.rpartition(".")[2] for name in self.env.domains.python_domain.objects)
        for node in self.document.findall(pending_xref):
            if node.get("reftype") == "class" and "refspecific" in node and meanings[node["reftarget"]] > 1:
                del node["refspecific"]


def setup(app):
    app.add_html_math_renderer("mathml", inline_renderers=(inline_math, None), block_renderers=(block_math, None))
    app.add_post_transform(TypesOfOneMeaning)
    return dict(parallel_read_safe=True, parallel_write_safe=True)
