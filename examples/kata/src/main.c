/* kata: numbers to Roman numerals and back. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "revision.h"
#include "roman.h"

static int usage(FILE *out)
{
    fputs("usage: kata NUMBER|NUMERAL...\n"
          "       kata --version\n"
          "Writes numbers from 1 to 3999 as Roman numerals, and reads numerals back.\n", out);
    return out == stderr ? 2 : 0;
}

static int convert(const char *word)
{
    char numeral[ROMAN_SIZE];
    char *end;
    unsigned long n;

    if (word[0] >= '0' && word[0] <= '9') {
        n = strtoul(word, &end, 10);
        if (*end || n > ROMAN_MAX || !roman_write((unsigned)n, numeral)) {
            fprintf(stderr, "kata: %s: not a number from 1 to %d\n", word, ROMAN_MAX);
            return 1;
        }
        puts(numeral);
    } else {
        n = roman_read(word);
        if (n == 0) {
            fprintf(stderr, "kata: %s: not a Roman numeral\n", word);
            return 1;
        }
        printf("%lu\n", n);
    }
    return 0;
}

int main(int argc, char **argv)
{
    int status = 0;

    if (argc < 2)
        return usage(stderr);
    if (strcmp(argv[1], "--help") == 0)
        return usage(stdout);
    if (strcmp(argv[1], "--version") == 0) {
        puts("kata " VERSION ", commit " KATA_REVISION);
        return 0;
    }
    for (int i = 1; i < argc; i++)
        status |= convert(argv[i]);
    return status;
}
