#include "tally.h"

#include <ctype.h>

size_t tally_words(const char *text)
{
    size_t words = 0;
    int inside = 0;

    for (; *text; text++) {
        int blank = isspace((unsigned char)*text);
        words += !blank && !inside;
        inside = !blank;
    }
    return words;
}

size_t tally_lines(const char *text)
{
    size_t lines = 0;
    char last = '\n';

    for (; *text; text++) {
        lines += *text == '\n';
        last = *text;
    }
    return lines + (last != '\n');
}
