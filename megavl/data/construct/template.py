"""Page templates: sizes and styles that a document is rendered in."""

from dataclasses import dataclass

# Every style names a font for the characters of each script that the distribution's small packages bring; a machine
# with others shows the rest with them.
_SERIF = '"DejaVu Serif", "WenQuanYi Micro Hei", serif'
_SANS = '"DejaVu Sans", "WenQuanYi Micro Hei", sans-serif'
_HEI = '"WenQuanYi Micro Hei", "DejaVu Sans", sans-serif'

_COMMON = """
* { box-sizing: border-box; overflow-wrap: anywhere; font-variant-ligatures: none; }
html, body { margin: 0; background: white; color: black; }
body { position: relative; overflow: hidden; }
#window { position: absolute; overflow: clip; overflow-clip-margin: 8px; }
#flow { column-fill: auto; orphans: 2; widows: 2; }
#folio { position: absolute; left: 0; right: 0; text-align: center; }
h1, h2, h3, h4, h5, h6 { break-after: avoid; line-height: 1.25; margin: 1.2em 0 0.5em; }
h1:first-child, h2:first-child, h3:first-child { margin-top: 0; }
p, .list, pre, table, blockquote, figure { margin: 0 0 0.7em; }
.list { padding-left: 1.9em; }
.list .list { margin: 0; }
.list .list .list .list .list .list { padding-left: 0; }
dd { margin: 0; }
.marker { display: inline-block; min-width: 1.5em; margin: 0 0.4em 0 -1.9em; text-indent: 0; text-align: right; }
img { max-width: 100%; vertical-align: middle; break-inside: avoid; }
table { border-collapse: collapse; max-width: 100%; }
td, th { padding: 0.25em 0.6em; text-align: left; vertical-align: top; }
tr { break-inside: avoid; }
thead, tfoot { display: table-row-group; }
pre, code { font-family: "DejaVu Sans Mono", "WenQuanYi Micro Hei Mono", monospace; font-size: 0.88em; }
pre { white-space: pre-wrap; tab-size: 4; line-height: 1.35; text-align: left; }
blockquote { margin-left: 1.5em; margin-right: 1.5em; }
blockquote blockquote blockquote { margin-left: 0; margin-right: 0; }
"""


@dataclass(frozen=True)
class Template:
    """One look of a page.

    width, height:             of the page, in CSS pixels (96 to the inch)
    top, right, bottom, left:  margins, in CSS pixels
    columns, gap:              text columns and the space between them, in CSS pixels
    font:                      CSS font families of the text
    folio:                     what stands at the bottom, of `{page}` and `{pages}`; nothing if empty
    style:                     CSS rules of its own
    """

    name: str
    width: int
    height: int
    top: int
    right: int
    bottom: int
    left: int
    columns: int
    gap: int
    font: str
    folio: str
    style: str

    @property
    def text_width(self) -> int:
        """Of the page's text, all columns and gaps together, in CSS pixels."""
        return self.width - self.left - self.right

    def page(self, body: str) -> str:
        """The whole HTML page. Its policy fetches nothing and runs nothing."""
        height = self.height - self.top - self.bottom
        return f"""<!doctype html><html><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>{_COMMON}
body {{ width: {self.width}px; height: {self.height}px; font-family: {self.font}; }}
#window {{ left: {self.left}px; top: {self.top}px; width: {self.text_width}px; }}
#flow {{ width: {self.text_width}px; height: {height}px; column-count: {self.columns}; column-gap: {self.gap}px; }}
img {{ max-height: {height * 6 // 10}px; }}
#folio {{ bottom: {self.bottom // 2 - 8}px; }}
{self.style}</style></head>
<body><div id="window"><div id="flow">{body}</div></div><div id="folio"></div></body></html>"""


TEMPLATES = {
    template.name: template
    for template in (
        Template(
            name="book",
            width=576,
            height=864,
            top=64,
            right=72,
            bottom=84,
            left=72,
            columns=1,
            gap=80,
            font=_SERIF,
            folio="{page}",
            style="""
#flow { font-size: 14.5px; line-height: 1.55; text-align: justify; }
p { margin: 0; text-indent: 1.6em; }
h1 + p, h2 + p, h3 + p, p:first-child, .list p { text-indent: 0; }
h1 { text-align: center; font-weight: normal; font-size: 1.7em; margin: 2.5em 0 1.6em; }
h1:first-child { margin-top: 2.5em; }
h2 { text-align: center; font-variant-caps: normal; font-size: 1.2em; }
.list, pre, table, figure { margin: 0.8em 0; }
td, th { border-top: 1px solid #888; border-bottom: 1px solid #888; }
#folio { font-size: 12px; }
""",
        ),
        Template(
            name="article",
            width=816,
            height=1056,
            top=72,
            right=66,
            bottom=80,
            left=66,
            columns=2,
            gap=26,
            font=_SERIF,
            folio="{page}",
            style="""
#flow { font-size: 11.5px; line-height: 1.4; text-align: justify; }
h1 { font-size: 1.7em; text-align: left; }
h2 { font-size: 1.2em; }
h3, h4 { font-size: 1em; font-style: italic; }
p { margin: 0 0 0.5em; }
table { font-size: 0.92em; width: 100%; border-top: 1.5px solid black; border-bottom: 1.5px solid black; }
th { border-bottom: 1px solid black; }
pre { font-size: 0.8em; border-left: 2px solid #999; padding-left: 0.7em; }
#folio { font-size: 11px; }
""",
        ),
        Template(
            name="exam",
            width=794,
            height=1123,
            top=80,
            right=80,
            bottom=96,
            left=80,
            columns=1,
            gap=96,
            font=_HEI,
            folio="{page} / {pages}",
            style="""
#flow { font-size: 16px; line-height: 1.8; }
body::before { content: ""; position: absolute; inset: 44px 44px 60px; border: 3px double black; }
h1 { text-align: center; font-size: 1.5em; padding-bottom: 0.5em; border-bottom: 1px solid black; }
h2, h3 { font-size: 1.1em; }
.marker { font-weight: bold; }
.item { margin-bottom: 0.3em; }
table { margin: 0.6em auto; }
td, th { border: 1px solid black; }
#folio { font-size: 13px; }
""",
        ),
        Template(
            name="web",
            width=1024,
            height=1280,
            top=56,
            right=140,
            bottom=56,
            left=140,
            columns=1,
            gap=160,
            font=_SANS,
            folio="",
            style="""
html, body { background: #f3f5f8; color: #1f2933; }
body::before { content: ""; position: absolute; inset: 0 88px; background: white; border: solid #d8dee6;
  border-width: 0 1px; }
#flow { font-size: 16px; line-height: 1.6; }
h1, h2, h3 { color: #14467c; }
h1, h2 { border-bottom: 1px solid #d8dee6; padding-bottom: 0.25em; }
pre, code { background: #eef1f5; border-radius: 4px; }
code { padding: 0 0.25em; }
pre { padding: 0.8em 1em; }
pre code { padding: 0; }
td, th { border: 1px solid #c5ced9; }
th { background: #e3ebf4; }
blockquote { border-left: 4px solid #8fb4dc; padding-left: 1em; margin-left: 0; color: #52606d; }
""",
        ),
    )
}
