// Differences between two answers, word by word.

const MOST_PAIRS = 4e6; // of words that are compared; longer answers are marked as a whole

/** Words and the white space between them, each with whether the other text lacks it: [parts of first, parts of second]. */
function differences(first, second) {
  const a = first.split(/(\s+)/).filter(Boolean), b = second.split(/(\s+)/).filter(Boolean);
  let start = 0, end = 0;
  while (start < Math.min(a.length, b.length) && a[start] === b[start]) start++;
  while (end < Math.min(a.length, b.length) - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
  const common = commonWords(a.slice(start, a.length - end), b.slice(start, b.length - end));
  const marked = (words, own) =>
    words.map((text, index) => {
      const inside = index >= start && index < words.length - end;
      return { text, differs: inside && !own.has(index - start) && text.trim() !== "" };
    });
  return [marked(a, common[0]), marked(b, common[1])];
}

/** Places of the words of a longest common subsequence, in either list. */
function commonWords(a, b) {
  const places = [new Set(), new Set()];
  if (a.length * b.length > MOST_PAIRS) return places;
  const width = b.length + 1, lengths = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      const here = i * width + j;
      lengths[here] = a[i] === b[j] ? lengths[here + width + 1] + 1 : Math.max(lengths[here + width], lengths[here + 1]);
    }
  }
  for (let i = 0, j = 0; i < a.length && j < b.length; ) {
    if (a[i] === b[j]) {
      places[0].add(i++);
      places[1].add(j++);
    } else if (lengths[(i + 1) * width + j] >= lengths[i * width + j + 1]) i++;
    else j++;
  }
  return places;
}
