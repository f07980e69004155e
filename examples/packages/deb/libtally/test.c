#include "tally.h"

#include <stdio.h>

static const struct {
    const char *text;
    size_t words, lines;
} cases[] = {
    {"", 0, 0},
    {"\n", 0, 1},
    {"one", 1, 1},
    {" one  two\tthree\n", 3, 1},
    {"one\ntwo\n\nthree", 3, 4},
};

int main(void)
{
    int bad = 0;

    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t words = tally_words(cases[i].text), lines = tally_lines(cases[i].text);
        if (words != cases[i].words || lines != cases[i].lines) {
            printf("case %zu: %zu words, %zu lines\n", i, words, lines);
            bad = 1;
        }
    }
    return bad;
}
