//! A small read-only tree over XML text, and edits that leave every other byte as it was.
//!
//! Domain XML is read for disks and rewritten for a restore. Rewriting must not lose what we do
//! not know: elements of newer libvirt versions, vendor namespaces, comments, order and white
//! space. So the tree keeps the byte span of everything, an [`Edits`] list replaces spans of the
//! original text, and nothing is ever serialised anew.
//!
//! The text comes from libvirt or from a sealed manifest, yet it is bounded and parsed strictly;
//! document types and entities of its own are refused (libvirt writes none).

use std::ops::Range;

use quick_xml::Reader;
use quick_xml::escape::{escape, unescape};
use quick_xml::events::{BytesStart, Event};

use crate::error::{Error, Kind, Result};

/// Largest document: libvirt's own limit for a string over its wire is 4 MiB
/// (`REMOTE_STRING_MAX` in remote_protocol.x).
const DOCUMENT_BYTES_MAX: usize = 4 << 20;

/// Deepest nesting; a backing chain nests one level per layer and libvirt stops at 200 layers.
const DEPTH_MAX: usize = 512;

/// An element with its attributes and child elements.
#[derive(Clone, Debug)]
pub struct Element {
    /// Name with prefix (`qemu:commandline`).
    pub name: String,
    /// Attributes in order.
    attributes: Vec<Attribute>,
    /// Child elements in order.
    pub children: Vec<Element>,
    /// Direct text, unescaped and trimmed.
    pub text: String,
    /// From `<` of the start tag to `>` of the end tag.
    span: Range<usize>,
    /// The start tag.
    open: Range<usize>,
}

#[derive(Clone, Debug)]
struct Attribute {
    name: String,
    value: String,
    /// The raw value between the quotes.
    span: Range<usize>,
}

impl Element {
    /// Parses a document; `what` names it in errors.
    pub fn parse(what: &str, text: &str) -> Result<Self> {
        let bad = |reason: String| {
            Error::new(Kind::Protocol, format!("{what} is not XML that libvirt writes: {reason}"))
        };
        if text.len() > DOCUMENT_BYTES_MAX {
            return Err(bad(format!("{} bytes long", text.len())));
        }
        let mut reader = Reader::from_str(text);
        let mut stack: Vec<Element> = Vec::new();
        let mut root = None;
        loop {
            let start = position(&reader);
            let event = reader.read_event().map_err(|e| bad(e.to_string()))?;
            let span = start..position(&reader);
            let ended = match event {
                Event::Start(tag) => {
                    if stack.len() >= DEPTH_MAX || root.is_some() {
                        return Err(bad(format!("too deep or a second root at byte {start}")));
                    }
                    stack.push(open(text, &tag, span).map_err(bad)?);
                    None
                }
                Event::Empty(tag) => Some(open(text, &tag, span).map_err(bad)?),
                Event::End(_) => {
                    let mut element = stack.pop().ok_or_else(|| bad("unopened end".into()))?;
                    element.span.end = span.end;
                    element.text = element.text.trim().to_owned();
                    Some(element)
                }
                Event::Text(_) | Event::GeneralRef(_) => {
                    if let Some(element) = stack.last_mut() {
                        let part = unescape(&text[span]).map_err(|e| bad(e.to_string()))?;
                        element.text.push_str(&part);
                    }
                    None
                }
                Event::CData(data) => {
                    if let Some(element) = stack.last_mut() {
                        element.text.push_str(&data.into_inner());
                    }
                    None
                }
                Event::Comment(_) | Event::Decl(_) | Event::PI(_) => None,
                Event::DocType(_) => return Err(bad("a document type".into())),
                Event::Eof => break,
            };
            match (ended, stack.last_mut()) {
                (Some(element), Some(parent)) => parent.children.push(element),
                (Some(element), None) if root.is_none() => root = Some(element),
                (Some(_), None) => return Err(bad("a second root".into())),
                (None, _) => {}
            }
        }
        if !stack.is_empty() {
            return Err(bad("it ends early".into()));
        }
        root.ok_or_else(|| bad("no element".into()))
    }

    /// The value of an attribute.
    pub fn attr(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|a| a.name == name).map(|a| a.value.as_str())
    }

    /// The first child called `name`.
    pub fn child(&self, name: &str) -> Option<&Element> {
        self.children.iter().find(|child| child.name == name)
    }

    /// The first element at a path of child names.
    pub fn at(&self, path: &[&str]) -> Option<&Element> {
        path.iter().try_fold(self, |element, name| element.child(name))
    }

    /// The attribute of the element at a path.
    pub fn attr_at(&self, path: &[&str], name: &str) -> Option<&str> {
        self.at(path)?.attr(name)
    }

    /// The text of the element at a path, if it has any.
    pub fn text_at(&self, path: &[&str]) -> Option<&str> {
        self.at(path).map(|e| e.text.as_str()).filter(|text| !text.is_empty())
    }

    /// All children called `name`.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Element> {
        self.children.iter().filter(move |child| child.name == name)
    }

    /// Calls `visit` for this element and everything below, parents first.
    pub fn walk<'a>(&'a self, visit: &mut impl FnMut(&'a Element)) {
        visit(self);
        for child in &self.children {
            child.walk(visit);
        }
    }

    /// The bytes of the element in its document.
    pub fn source<'a>(&self, document: &'a str) -> &'a str {
        &document[self.span.clone()]
    }

    fn is_empty_tag(&self) -> bool {
        self.span == self.open
    }
}

fn position(reader: &Reader<&[u8]>) -> usize {
    usize::try_from(reader.buffer_position()).expect("a document fits into memory")
}

/// Builds the element of a start tag; attribute spans are offsets into the whole text.
fn open(text: &str, tag: &BytesStart<'_>, span: Range<usize>) -> Result<Element, String> {
    let mut attributes = Vec::new();
    // Attribute values are searched from left to right: each lies behind the one before.
    let mut from = span.start;
    for attribute in tag.attributes() {
        let attribute = attribute.map_err(|e| e.to_string())?;
        let raw: &str = &attribute.value;
        let name = attribute.key.as_ref();
        let key = find(text, from..span.end, name).ok_or("an attribute out of place")?;
        let quote = text[key.end..span.end].find(['"', '\'']).ok_or("an unquoted attribute")?;
        let start = key.end + quote + 1;
        from = start + raw.len();
        if text.get(start..from) != Some(raw) {
            return Err(format!("attribute {name} of <{}>", tag.name().as_ref()));
        }
        let value = unescape(raw).map_err(|e| e.to_string())?.into_owned();
        attributes.push(Attribute { name: name.to_owned(), value, span: start..from });
    }
    Ok(Element {
        name: tag.name().as_ref().to_owned(),
        attributes,
        children: Vec::new(),
        text: String::new(),
        open: span.clone(),
        span,
    })
}

/// The next place of attribute `name` (between white space and `=`) in `range`.
fn find(text: &str, range: Range<usize>, name: &str) -> Option<Range<usize>> {
    let mut from = range.start;
    loop {
        let at = from + text.get(from..range.end)?.find(name)?;
        let end = at + name.len();
        let before = text[..at].ends_with(|c: char| c.is_ascii_whitespace());
        if before && text[end..range.end].trim_start().starts_with('=') {
            return Some(at..end);
        }
        from = end;
    }
}

/// Replacements of spans of one document.
#[derive(Debug, Default)]
pub struct Edits {
    list: Vec<(Range<usize>, String)>,
}

impl Edits {
    /// Sets an attribute, adding it at the end of the start tag when it is missing.
    pub fn set_attr(&mut self, document: &str, element: &Element, name: &str, value: &str) {
        let value = escape(value);
        if let Some(attribute) = element.attributes.iter().find(|a| a.name == name) {
            self.list.push((attribute.span.clone(), value.into_owned()));
        } else {
            let tag = &document[element.open.clone()];
            let tail = if tag.ends_with("/>") { 2 } else { 1 };
            let at = element.open.end - tail;
            self.list.push((at..at, format!(" {name}='{value}'")));
        }
    }

    /// Removes an attribute with the white space before it.
    pub fn remove_attr(&mut self, document: &str, element: &Element, name: &str) {
        let Some(attribute) = element.attributes.iter().find(|a| a.name == name) else { return };
        let before = &document[element.open.start..attribute.span.start];
        let key = before.rfind(name).expect("the name stands before its value");
        let start = element.open.start + before[..key].trim_end().len();
        self.list.push((start..attribute.span.end + 1, String::new()));
    }

    /// Replaces the whole content of an element by text.
    pub fn set_text(&mut self, document: &str, element: &Element, text: &str) {
        self.set_content(document, element, escape(text).into_owned());
    }

    /// Replaces the whole content of an element by XML.
    pub fn set_content(&mut self, document: &str, element: &Element, xml: String) {
        if element.is_empty_tag() {
            let tag = document[element.span.clone()].trim_end_matches("/>").trim_end();
            self.list.push((element.span.clone(), format!("{tag}>{xml}</{}>", element.name)));
        } else {
            let end = element.span.end - closing_tag_len(document, element);
            self.list.push((element.open.end..end, xml));
        }
    }

    /// Replaces an element by XML.
    pub fn replace(&mut self, element: &Element, xml: String) {
        self.list.push((element.span.clone(), xml));
    }

    /// Adds XML as the first child of an element.
    pub fn insert_first(&mut self, document: &str, element: &Element, xml: &str) {
        if element.is_empty_tag() {
            self.set_content(document, element, xml.to_owned());
        } else {
            self.list.push((element.open.end..element.open.end, xml.to_owned()));
        }
    }

    /// Removes an element and the white space before it, so that no empty line remains.
    pub fn remove(&mut self, document: &str, element: &Element) {
        let start = document[..element.span.start].trim_end().len();
        self.list.push((start..element.span.end, String::new()));
    }

    /// The document with the edits. An edit inside a removed or replaced element goes with it.
    pub fn apply(mut self, document: &str) -> String {
        self.list.sort_by(|(a, _), (b, _)| a.start.cmp(&b.start).then(b.end.cmp(&a.end)));
        let mut out = String::with_capacity(document.len());
        let mut at = 0;
        for (span, text) in self.list {
            if span.start < at {
                continue;
            }
            out.push_str(&document[at..span.start]);
            out.push_str(&text);
            at = span.end;
        }
        out.push_str(&document[at..]);
        out
    }
}

fn closing_tag_len(document: &str, element: &Element) -> usize {
    let source = &document[element.span.clone()];
    source.len() - source.rfind("</").expect("an element that is no empty tag has an end tag")
}

/// Text for an attribute or an element of XML we write.
pub fn escaped(text: &str) -> String {
    escape(text).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DOCUMENT: &str = "<domain type='kvm' xmlns:q=\"u\">\n  <!-- <name>no</name> -->\n  \
        <name>a&amp;b</name>\n  <os><type arch=\"x\">hvm</type></os>\n  <devices>\n    \
        <disk type='file'   device='disk'>\n      <source file='/a b&apos;.img' index='3'/>\n    \
        </disk>\n    <q:x/>\n  </devices>\n</domain>\n";

    fn parse(text: &str) -> Element {
        Element::parse("test", text).unwrap()
    }

    #[test]
    fn the_tree_says_what_the_text_says() {
        let root = parse(DOCUMENT);
        assert_eq!(root.text_at(&["name"]), Some("a&b"));
        assert_eq!(root.attr_at(&["devices", "disk", "source"], "file"), Some("/a b'.img"));
        assert_eq!(root.attr_at(&["os", "type"], "arch"), Some("x"));
        assert!(root.at(&["devices", "q:x"]).is_some());
    }

    #[test]
    fn edits_touch_their_span_and_nothing_else() {
        let root = parse(DOCUMENT);
        let source = root.at(&["devices", "disk", "source"]).unwrap();
        let mut edits = Edits::default();
        edits.set_attr(DOCUMENT, source, "file", "/new<'>");
        edits.remove_attr(DOCUMENT, source, "index");
        edits.set_attr(DOCUMENT, root.at(&["devices", "q:x"]).unwrap(), "y", "1");
        edits.set_text(DOCUMENT, root.child("name").unwrap(), "c");
        let expected = DOCUMENT
            .replace("file='/a b&apos;.img' index='3'", "file='/new&lt;&apos;&gt;'")
            .replace("<q:x/>", "<q:x y='1'/>")
            .replace("a&amp;b", "c");
        assert_eq!(edits.apply(DOCUMENT), expected);
    }

    #[test]
    fn a_removed_element_takes_its_line_and_the_edits_within() {
        let root = parse(DOCUMENT);
        let disk = root.at(&["devices", "disk"]).unwrap();
        let mut edits = Edits::default();
        edits.set_attr(DOCUMENT, disk.child("source").unwrap(), "file", "x");
        edits.remove(DOCUMENT, disk);
        let out = edits.apply(DOCUMENT);
        assert!(out.contains("<devices>\n    <q:x/>"), "{out}");
    }

    #[test]
    fn what_libvirt_does_not_write_is_refused() {
        for text in
            ["", "<a>", "<a/><b/>", "<a></b>", "<!DOCTYPE a []><a/>", "<a b='&x;'/>", "<a b=c/>"]
        {
            assert!(Element::parse("test", text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_parses_or_fails_without_panic(text in "[<>/='\" a-c&;!\\-\\[\\]]{0,60}") {
            drop(Element::parse("test", &text));
        }

        #[test]
        fn values_survive_an_edit(value in "\\PC{0,40}") {
            let root = parse(DOCUMENT);
            let source = root.at(&["devices", "disk", "source"]).unwrap();
            let mut edits = Edits::default();
            edits.set_attr(DOCUMENT, source, "file", &value);
            let out = parse(&edits.apply(DOCUMENT));
            prop_assert_eq!(out.attr_at(&["devices", "disk", "source"], "file"), Some(&*value));
        }
    }
}
