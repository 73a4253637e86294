// Opened from the disk, a page may not read another one: search results then come without excerpts, and without errors.
if (location.protocol === 'file:') DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
