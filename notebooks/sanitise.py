"""What of an executed notebook may stand in a page: an allowlist, since a notebook from elsewhere may hold anything.

Scripts, handlers, forms and frames go; pictures stay if they lie in the page itself. The rules of pandas' `<style>` blocks
become the attributes of what they apply to, so that tables keep their looks without a style sheet that comes from a notebook.
"""

from __future__ import annotations

import re

import soupsieve
import tinycss2
from bleach import clean
from bleach.css_sanitizer import CSSSanitizer
from bs4 import BeautifulSoup

# Their content is no text to show, so they go with it.
NEVER_SHOWN = [
    "script",
    "style",
    "iframe",
    "object",
    "embed",
    "template",
    "noscript",
    "title",
    "textarea",
    "svg",
]
TEXT = {
    "a", "abbr", "b", "blockquote", "br", "caption", "code", "col", "colgroup", "dd", "del", "details",
    "div", "dl", "dt", "em", "figcaption", "figure", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "i", "img",
    "kbd", "li", "ol", "p", "pre", "s", "small", "span", "strong", "sub", "summary", "sup", "table",
    "tbody", "td", "tfoot", "th", "thead", "tr", "tt", "u", "ul",
}  # fmt: skip
MATHML = {
    "math", "menclose", "mfrac", "mi", "mmultiscripts", "mn", "mo", "mover", "mpadded", "mphantom",
    "mroot", "mrow", "ms", "mspace", "msqrt", "mstyle", "msub", "msubsup", "msup", "mtable", "mtd",
    "mtext", "mtr", "munder", "munderover", "none",
}  # fmt: skip
# Of the MathML that latex2mathml writes.
MATHML_ATTRIBUTES = {"accent", "columnalign", "columnlines", "columnspacing", "depth", "display", "displaystyle", "fence",
    "form", "height", "linebreak", "linethickness", "lspace", "mathcolor", "mathsize", "mathvariant", "maxsize", "minsize",
    "movablelimits", "notation", "rowlines", "rowspacing", "rspace", "scriptlevel", "separator", "stretchy", "symmetric",
    "voffset", "width"}  # fmt: skip
ATTRIBUTES = {
    "*": {"class", "id", "style", "title", "tabindex", "data-mime-type", "data-type"},
    "img": {"alt", "src", "width", "height"},
    "a": {"href"},
    "td": {"colspan", "rowspan"},
    "th": {"colspan", "rowspan", "scope"},
    "col": {"span"},
    "colgroup": {"span"},
    "ol": {"start"},
    "details": {"open"},
}
# None of them takes a url().
STYLES = CSSSanitizer(
    ["background-color", "border-collapse", "caption-side", "color", "display", "font-style", "font-weight", "height",
     "max-width", "opacity", "padding", "text-align", "text-decoration", "vertical-align", "white-space", "width"],
    [],
)  # fmt: skip
PICTURE = re.compile(r"data:image/(?:png|jpeg|gif|svg\+xml);base64,[A-Za-z0-9+/=\s]+")
# A page of ours, a place in this one, or another host that is visited only by a click.
LINK = re.compile(r"(?:https?://|mailto:|#|[\w.-]+/)[^\s]*|[\w.-]+\.html(?:#.*)?", re.IGNORECASE)


def sanitise(html: str) -> str:
    """HTML of an executed notebook -> the same without all that could run or ask another host for something."""
    soup = BeautifulSoup(html, "html.parser")
    _inline_styles(soup)
    for element in soup.find_all(NEVER_SHOWN):
        element.decompose()
    return clean(
        str(soup),
        tags=TEXT | MATHML,
        attributes=_allowed,
        protocols={"http", "https", "mailto", "data"},
        css_sanitizer=STYLES,
        strip=True,
    )


def _allowed(tag: str, name: str, value: str) -> bool:
    if tag in MATHML:
        return name in MATHML_ATTRIBUTES
    if name == "src":
        return tag == "img" and PICTURE.fullmatch(value) is not None
    if name == "href":
        return tag == "a" and LINK.fullmatch(value) is not None
    return name in ATTRIBUTES["*"] or name in ATTRIBUTES.get(tag, ())


def _inline_styles(soup: BeautifulSoup) -> None:
    """Write the rules of each `<style>` into the style attributes of what they select beside it."""
    for sheet in soup.find_all("style"):
        rules = tinycss2.parse_stylesheet(sheet.string or "", skip_comments=True, skip_whitespace=True)
        for rule in rules:
            if rule.type != "qualified-rule" or sheet.parent is None:
                continue
            try:
                selected = sheet.parent.select(tinycss2.serialize(rule.prelude))
            except soupsieve.SelectorSyntaxError:
                continue
            for element in selected:
                own = element.get("style", "").rstrip("; ")
                declared = tinycss2.serialize(rule.content).strip().rstrip(";")
                element["style"] = f"{declared}; {own}" if own else declared
